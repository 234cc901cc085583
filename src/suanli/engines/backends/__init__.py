"""Ways to run a trained model: one a file."""
