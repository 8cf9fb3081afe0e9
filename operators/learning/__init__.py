"""Training: one loop, in a step's own process or in a group of workers."""
