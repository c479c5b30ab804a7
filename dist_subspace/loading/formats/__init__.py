"""Checkpoints whose weights are quantised: how each format lies in a file. A new format is a file of this folder."""

from dist_subspace.loading.formats.registry import Found, discover, find_weights, quantisation_of, take_quantisation
from dist_subspace.loading.formats.unread import check_read

__all__ = ["Found", "check_read", "find_weights", "quantisation_of", "take_quantisation"]

discover(__path__)
del discover
