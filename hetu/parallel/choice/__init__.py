"""What a strategy costs before any plan is made: counted in closed form, in symbols or over arrays of pieces."""
