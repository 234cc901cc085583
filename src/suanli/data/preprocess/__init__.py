"""From raw input to model input: one kind of data a file, each exporting PREPROCESS."""
