"""Distributed, quantised, parameter-efficient fine-tuning: subspace adapters on sharded frozen transformers."""

from dist_subspace.api import attach, load_adapter
from dist_subspace.interchange.adapter import save_adapter
from dist_subspace.loading.load import load_frozen
from dist_subspace.subspace import MethodInfo, SubspaceConfig, disabled, methods, parameter_groups, trainable_parameters
from dist_subspace.summary import summary

__version__ = "0.1.0"

__all__ = [
    "MethodInfo",
    "SubspaceConfig",
    "attach",
    "disabled",
    "load_adapter",
    "load_frozen",
    "methods",
    "parameter_groups",
    "save_adapter",
    "summary",
    "trainable_parameters",
]
