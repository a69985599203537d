"""Attention in plain torch: the kernel family that runs everywhere, and computes float64."""
