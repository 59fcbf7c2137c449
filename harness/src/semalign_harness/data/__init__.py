"""Rows: settings, files, encoding, and the generated problems."""
