"""Moved."""

import sys

from bandmask import packs

sys.modules[__name__] = packs
