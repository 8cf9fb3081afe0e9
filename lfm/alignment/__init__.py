"""Alignment: models that learnt the same from different starts are brought into one basin."""
