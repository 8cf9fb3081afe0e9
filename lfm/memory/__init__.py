"""Memory: facts are kept beside a model and consulted while it answers; its weights stay as they are."""
