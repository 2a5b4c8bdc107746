"""Moved."""

import sys

from bandmask import scene

sys.modules[__name__] = scene
