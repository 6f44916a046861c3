"""Optimizers, learned or not, on the same tasks, and what is shown of them."""
