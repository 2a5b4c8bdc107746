"""Moved."""

import sys

from bandmask import align

sys.modules[__name__] = align
