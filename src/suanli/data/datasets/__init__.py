"""Data sets that suanli knows by name: one per file, each exporting DATASET."""
