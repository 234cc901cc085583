"""What a user can do: one verb a file, each a function of the same name."""
