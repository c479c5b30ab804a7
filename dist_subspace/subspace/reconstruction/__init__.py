"""Methods that reshape the subspaces a frozen matrix has: its singular values (mode 1) or vectors (mode 2)."""
