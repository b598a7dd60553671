"""Where weights come from and what they are called: files, names, groups of linears, folds, and the decoder."""
