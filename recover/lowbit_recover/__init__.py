"""Recovery: what pruning and low bits lost is taught again, by the base's distributions or a user's examples."""
