"""Moved."""

import sys

from bandmask import train
from bandmask.train import explain_out_of_memory as explain_out_of_memory

sys.modules[__name__] = train
