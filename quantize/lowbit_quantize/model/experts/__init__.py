"""Routed experts as linears, those that are not in memory, and who sends tokens to them."""
