"""What streams a merge."""
