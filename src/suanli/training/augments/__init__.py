"""Augmentations of training inputs: one a file, each exporting AUGMENT."""
