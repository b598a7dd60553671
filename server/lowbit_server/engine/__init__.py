"""Everything that touches vLLM or predicts what it will do."""
