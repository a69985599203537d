"""Reads plans: prints, prices and draws them."""
