"""The load: what is sent and when, decided before the first send, and sending it on time."""
