"""Several processes that train one model: group, sharding, launch, preflight, watchdog."""
