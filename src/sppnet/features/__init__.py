"""An image becomes feature maps once; any window of them becomes a vector."""
