"""What the verb `search` searches: spaces of values, who draws from them, and which trials are the best."""
