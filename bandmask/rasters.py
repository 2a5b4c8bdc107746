"""Moved."""

import sys

from bandmask import mosaic

sys.modules[__name__] = mosaic
