"""From a path or a name to batches on the device."""
