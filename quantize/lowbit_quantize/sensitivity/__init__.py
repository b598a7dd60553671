"""How much each decision on a scheme costs at the end of the model, and schemes chosen by that."""
