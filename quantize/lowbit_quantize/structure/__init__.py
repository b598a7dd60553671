"""What is taken out of a layer, and what the rest becomes: which channels or heads go, cut out of all that has them."""
