"""The port: how HTTP arrives and ends, what answers while the engine loads, certificates and sockets."""
