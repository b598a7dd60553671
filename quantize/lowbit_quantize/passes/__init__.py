"""What can be done to a layer. One file a pass: its options, whether they fit a model, and the work."""
