"""Files of answers that other programs read: one format a file."""
