"""Where weights to start from come from, one place a file: see `core.types.WeightsSource`."""
