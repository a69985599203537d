"""A module's parts that are neither attention nor communication, through Inductor: once a structure, for all lengths."""
