"""Moved."""

import sys

from bandmask import heads

sys.modules[__name__] = heads
