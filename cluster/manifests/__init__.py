"""Documents that make a cluster of a profile: pure functions to plain values, and what must hold of these."""
