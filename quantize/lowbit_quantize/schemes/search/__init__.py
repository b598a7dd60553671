"""Scales and zero points that err least, searched on their grids and solved for once codes are chosen."""
