"""`lowbit plan`: from targets (memory, context, latency, KL) to a recipe that meets them, or to what is missing."""
