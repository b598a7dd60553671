"""How codes lie in a file's words and bytes, and linears that are read back from them."""
