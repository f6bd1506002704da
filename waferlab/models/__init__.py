"""The architectures, what they have in common, and the weights that they start from."""
