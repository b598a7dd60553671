"""What is known of a run before its first token: what fits, how large it gets, and what engines will take."""
