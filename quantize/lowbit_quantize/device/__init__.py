"""What a CPU or a GPU likes: block sizes, precision, memory, parallel pieces. Knows nothing of models."""
