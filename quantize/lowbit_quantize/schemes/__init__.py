"""Classes of numbers: how a weight, and where the scheme has them its inputs, are stored. One file a class."""
