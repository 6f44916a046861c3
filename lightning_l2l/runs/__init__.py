"""A run: its folder, its checkpoints, its end, its processes."""
