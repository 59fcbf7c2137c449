"""What knows nothing of models, rows and experiments."""
