"""Who may ask, how much and how long: what stands before vLLM's routers, and the HTTP server that listens."""
