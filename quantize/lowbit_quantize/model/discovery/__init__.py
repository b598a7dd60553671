"""Architectures found by running them: a narrow twin of a configuration is run, and what is seen is a description."""
