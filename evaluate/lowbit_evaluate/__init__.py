"""`lowbit evaluate`: a model, in process or served, answers tasks and is compared with its base model."""
