"""How a training step is computed, and the search for the fastest way."""
