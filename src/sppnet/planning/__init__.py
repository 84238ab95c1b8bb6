"""A plan before long work: what it will take, from a calibration on this machine and arithmetic."""
