"""Adapters as files. Knows subspace, storage and placement."""
