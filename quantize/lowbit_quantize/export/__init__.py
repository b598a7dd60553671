"""Targets that a finished checkpoint can be made into. One file a target."""
