"""Meta-learning: what makes a model learn a new task from a few examples."""
