"""Ways to compute the same faster: one a file, each exporting SPEEDUP."""
