"""Methods that look up, while a model answers, what followed in similar places of a corpus."""
