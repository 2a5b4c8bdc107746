"""Moved to `bandmask.plots` and `bandmask.viewer`."""

from bandmask.plots import *  # noqa: F403
from bandmask.viewer import BandMaskViewer as BandMaskViewer
from bandmask.viewer import State as State
from bandmask.viewer import render as render
