"""How close a compressed model stayed to its base, and the text that it is calibrated on and judged by."""
