"""Quality in production: a share of what was served is scored again by the served model and by its base."""
