"""Helpers below models, rows and experiments."""
