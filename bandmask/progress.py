"""Moved."""

import sys

from bandmask import train
from bandmask.train import ENVIRONMENT as ENVIRONMENT

sys.modules[__name__] = train
