"""What may see what: masks, and the segments that they turn into."""
