"""The walk down a model: hidden states, one layer at a time, and what passes do to each layer on the way."""
