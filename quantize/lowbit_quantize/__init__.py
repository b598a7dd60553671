"""Offline compression: a base model in, a proven checkpoint out."""
