"""Data: files, rows, tokens and batches."""
