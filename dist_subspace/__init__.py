"""Distributed, quantised, parameter-efficient fine-tuning: subspace adapters on sharded frozen transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_subspace.accounting import summary
    from dist_subspace.adapted.combining import combine_adapters
    from dist_subspace.adapted.python import generate, load, train
    from dist_subspace.adapted.switching import switch_adapter
    from dist_subspace.advancing import advance
    from dist_subspace.api import attach, import_peft, load_adapter, save_adapter
    from dist_subspace.interchange.merge import merge
    from dist_subspace.interchange.peft.export import export_peft
    from dist_subspace.loading.load import load_frozen
    from dist_subspace.rate_search.python import find_learning_rate
    from dist_subspace.subspace import (
        MethodInfo,
        SubspaceConfig,
        disabled,
        methods,
        parameter_groups,
        trainable_parameters,
    )
    from dist_subspace.trainers import TrainerMixin

__version__ = "0.1.0"

__all__ = [
    "MethodInfo",
    "SubspaceConfig",
    "TrainerMixin",
    "advance",
    "attach",
    "combine_adapters",
    "disabled",
    "export_peft",
    "find_learning_rate",
    "generate",
    "import_peft",
    "load",
    "load_adapter",
    "load_frozen",
    "merge",
    "methods",
    "parameter_groups",
    "save_adapter",
    "summary",
    "switch_adapter",
    "train",
    "trainable_parameters",
]

_HOMES = {
    "TrainerMixin": "dist_subspace.trainers",
    "advance": "dist_subspace.advancing",
    "attach": "dist_subspace.api",
    "combine_adapters": "dist_subspace.adapted.combining",
    "find_learning_rate": "dist_subspace.rate_search.python",
    "generate": "dist_subspace.adapted.python",
    "import_peft": "dist_subspace.api",
    "load": "dist_subspace.adapted.python",
    "load_adapter": "dist_subspace.api",
    "load_frozen": "dist_subspace.loading.load",
    "export_peft": "dist_subspace.interchange.peft.export",
    "merge": "dist_subspace.interchange.merge",
    "summary": "dist_subspace.accounting",
    "save_adapter": "dist_subspace.api",
    "switch_adapter": "dist_subspace.adapted.switching",
    "train": "dist_subspace.adapted.python",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `--help` need not wait for torch, transformers and DeepSpeed."""
    if name not in __all__:
        raise AttributeError(f"module 'dist_subspace' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "dist_subspace.subspace")), name)
    globals()[name] = value
    return value
