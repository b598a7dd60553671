"""The page at `/`: a chat, what runs, and what was proven, for a browser."""
