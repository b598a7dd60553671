"""What a base model may be: a directory, a hub repository, a GGUF file; what each says of itself, and what is none."""
