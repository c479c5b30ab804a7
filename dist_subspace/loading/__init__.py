"""Checkpoint files become a sharded, quantised model. Knows storage and placement."""
