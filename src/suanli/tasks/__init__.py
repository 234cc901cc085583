"""Tasks: what is learned and how it is scored, one per file, each exporting TASK."""
