"""Moved."""

import sys

from bandmask import viewer

sys.modules[__name__] = viewer
