"""hetu's attention inside other libraries. Each module is imported by its name, for each needs its library."""
