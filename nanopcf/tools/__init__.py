"""Small commands beside the paper's path."""
