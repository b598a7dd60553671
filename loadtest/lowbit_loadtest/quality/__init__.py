"""Quality through an endpoint: what is asked, how it is scored, and whether load changes the answers."""
