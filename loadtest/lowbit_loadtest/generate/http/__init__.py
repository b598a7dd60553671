"""HTTP below the API: where a server is and how it is reached, connections, server-sent events."""
