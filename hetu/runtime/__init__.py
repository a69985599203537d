"""The stages that compute, lower and launch, and what lasts between runs."""
