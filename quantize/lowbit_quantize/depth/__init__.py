"""Which layers of a model may go, measured on the model itself before it walks."""
