"""The page of one quantize run, made of nothing but its manifest: what `lowbit inspect --html` writes."""
