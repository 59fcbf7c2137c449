"""One experiment into one folder."""
