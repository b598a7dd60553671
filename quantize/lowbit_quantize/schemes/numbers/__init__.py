"""The numbers that codes stand for: integers under scales and zero points, 4- and 8-bit floats, blocks' scales."""
