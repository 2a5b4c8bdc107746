"""The graph of notebook runs: what is to be done, what it costs, and how it stands."""
