"""Readers of data on disk: one format per file, each exporting READER."""
