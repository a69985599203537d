"""What a plan is made of: its data, and what is found out of it."""
