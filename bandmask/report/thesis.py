"""Moved."""

import sys

from bandmask import thesis

sys.modules[__name__] = thesis
