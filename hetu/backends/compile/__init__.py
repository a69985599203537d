"""Inductor for a module's parts that are neither attention nor communication: once per structure, for all lengths."""
