"""Editing: single facts that a model knows are changed, and the rest of it stays as it is."""
