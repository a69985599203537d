"""The stages that need no device: bind, select and plan."""
