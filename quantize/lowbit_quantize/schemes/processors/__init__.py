"""Which processors run each scheme: one table of linears, one of routed experts, and how a row is said."""
