"""What everything else uses: types, errors, registry, run directory, settings, storage, console, signals, paths."""
