"""Moved to `bandmask.viewer` and `bandmask.plots`."""
