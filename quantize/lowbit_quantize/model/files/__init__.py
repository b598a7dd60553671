"""What the files of a base hold, under which names and types, and how a tensor of the model comes out of them."""
