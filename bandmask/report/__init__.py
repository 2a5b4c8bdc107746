"""What was measured beside what the thesis printed, in figures and words."""
