"""Files as they are delivered, and what makes packed arrays of them."""
