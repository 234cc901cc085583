"""Ways to read what lies at a path: one a file, each exporting READER."""
