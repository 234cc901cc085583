"""Data: reading, decoding, caching and batches."""
