"""Which bands of an image are broken, and what to do with it."""
