"""Accuracy over every subset of bands, and what each band is worth."""
