"""Moving outliers from activations into weights without changing the function."""
