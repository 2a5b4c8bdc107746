"""Moved."""

import sys

from bandmask import encoders

sys.modules[__name__] = encoders
