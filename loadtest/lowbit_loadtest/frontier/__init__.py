"""Several checkpoints measured in turn, and which of them to serve."""
