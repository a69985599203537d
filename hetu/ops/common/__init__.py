"""What the modules of ops share."""
