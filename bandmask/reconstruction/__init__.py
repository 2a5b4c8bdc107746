"""Hidden pixels predicted by a light head, and the errors in reflectance."""
