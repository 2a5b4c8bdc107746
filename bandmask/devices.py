"""Moved."""

import sys

from bandmask import batches

sys.modules[__name__] = batches
