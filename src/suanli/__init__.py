"""suanli (算力, computing power): data in, a trained, measured model out."""
