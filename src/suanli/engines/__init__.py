"""How a trained model is run, and the search for the fastest way."""
