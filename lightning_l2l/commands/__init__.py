"""The commands of `python -m lightning_l2l`."""
