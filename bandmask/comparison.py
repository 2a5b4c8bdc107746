"""Moved."""

import sys

from bandmask import stats

sys.modules[__name__] = stats
