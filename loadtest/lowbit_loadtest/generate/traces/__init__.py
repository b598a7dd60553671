"""Recorded traffic: one file for each format, `read.py` chooses."""
