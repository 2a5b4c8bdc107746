"""Moved."""

import sys

from bandmask import fills

sys.modules[__name__] = fills
