"""What a model costs and how it is laid out, worked out without running it."""
