"""Random changes to training inputs: one a file, each exporting AUGMENT."""
