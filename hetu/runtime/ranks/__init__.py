"""A run over several ranks: how they find each other, what they agree on, and what each is fed."""
