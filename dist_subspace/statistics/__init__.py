"""Statistics of frozen matrices (SVDs, row norms): made once, shared out over the ranks, kept. Knows all three axes."""

from dist_subspace.statistics.setup import kept_files, remade_files, set_up_statistics

__all__ = ["kept_files", "remade_files", "set_up_statistics"]
