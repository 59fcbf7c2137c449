"""Methods of others: parameters of the source put into the target."""
