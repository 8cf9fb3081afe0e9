"""Bring models into one basin."""
