"""Moved."""

import sys

from bandmask import masks

sys.modules[__name__] = masks
