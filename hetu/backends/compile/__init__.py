"""Inductor for a module's parts that are neither attention nor communication: once a structure, for all lengths."""
