"""Moved."""

import sys

from bandmask import plots

sys.modules[__name__] = plots
