"""Ways to step the weights: one a file, each exporting OPTIMIZER."""
