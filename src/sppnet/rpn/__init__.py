"""Training, end to end and with PyTorch, of a backbone with a feature pyramid that proposes windows."""
