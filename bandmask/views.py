"""Moved."""

import sys

from bandmask import evaluate

sys.modules[__name__] = evaluate
