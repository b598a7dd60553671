"""The target `gguf`: one file that llama.cpp and its kin read, with the checkpoint's own codes."""
