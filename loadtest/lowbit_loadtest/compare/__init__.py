"""Two results of a load test side by side, whatever tool wrote them: how they differ, how sure that is, a verdict."""
