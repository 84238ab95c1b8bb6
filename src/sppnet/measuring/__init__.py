"""What units of work take, measured in a process of its own: ``python -m sppnet.measuring``."""
