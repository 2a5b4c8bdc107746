"""Moved."""

import sys

from bandmask import train

sys.modules[__name__] = train
