"""Distillation of a finished checkpoint from its base: scales and norms, all weights, or a smaller student."""
