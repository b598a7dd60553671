"""Ways to choose the numbers of a weight, one file a method; what the numbers are is the scheme's."""
