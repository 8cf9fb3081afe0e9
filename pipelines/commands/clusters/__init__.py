"""What `lfm cluster` does: a module for each action, with a function `act`."""
