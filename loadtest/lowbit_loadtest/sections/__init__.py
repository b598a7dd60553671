"""Sections of a scenario that have several kinds."""
