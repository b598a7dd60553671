"""Load test: throughput and latency of an OpenAI-compatible endpoint."""
