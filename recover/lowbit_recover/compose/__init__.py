"""Several steps as one run: prune, recover, quantize, recover."""
