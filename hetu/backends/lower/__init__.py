"""From nodes to calls of a ``torch.fx`` module."""
