"""The data sets with a name: one a file, each exporting DATASET."""
