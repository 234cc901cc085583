"""What is learned and how it is examined: one a file, each exporting TASK."""
