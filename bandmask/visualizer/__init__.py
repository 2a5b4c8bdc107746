"""The band-mask visualizer: pure rendering under a thin widget."""
