"""The serving layer: vLLM behind an OpenAI-compatible HTTP endpoint, with its own metrics."""
