"""Helpers that several families of ops use."""
