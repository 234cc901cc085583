"""Optimizers: one a file, each exporting OPTIMIZER."""
