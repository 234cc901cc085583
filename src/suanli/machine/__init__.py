"""This machine: device and GPUs, timing in pairs, energy, the peak that it reaches, disk."""
