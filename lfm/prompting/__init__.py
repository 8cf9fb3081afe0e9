"""Prompting: a prompt is made better by asking alone."""
