"""Moved."""

import sys

from bandmask import results

sys.modules[__name__] = results
