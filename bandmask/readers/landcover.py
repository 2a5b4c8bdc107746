"""Moved."""

import sys

from bandmask import datasets

sys.modules[__name__] = datasets
