"""Named networks: one a file, each exporting MODEL."""
