"""From raw inputs to model inputs: one kind of data per file, each exporting PREPROCESS."""
