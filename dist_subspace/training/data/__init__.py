"""Data of a training run: files or Hub data sets -> tokens on disk -> global batches that are functions of the step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_subspace.training.data.batches import Batches, BatchSettings, GlobalBatch, eval_batches, eval_filler
    from dist_subspace.training.data.cutting import Cutting
    from dist_subspace.training.data.micro_batch import MicroBatch
    from dist_subspace.training.data.packed_attention import (
        LEAK_LIMIT,
        enable_packing,
        packing_leak,
        takes_segment_lengths,
    )
    from dist_subspace.training.data.samples import IGNORED
    from dist_subspace.training.data.settings import DataSettings
    from dist_subspace.training.data.table import TokenTable
    from dist_subspace.training.data.template import DEFAULT_CHAT_TEMPLATE
    from dist_subspace.training.data.tokens import Evaluated, Prepared, prepare, prepare_evaluation

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "IGNORED",
    "LEAK_LIMIT",
    "BatchSettings",
    "Batches",
    "Cutting",
    "DataSettings",
    "Evaluated",
    "GlobalBatch",
    "MicroBatch",
    "Prepared",
    "TokenTable",
    "enable_packing",
    "eval_batches",
    "eval_filler",
    "packing_leak",
    "prepare",
    "prepare_evaluation",
    "takes_segment_lengths",
]

_HOMES = {
    "batches": ("BatchSettings", "Batches", "GlobalBatch", "eval_batches", "eval_filler"),
    "cutting": ("Cutting",),
    "micro_batch": ("MicroBatch",),
    "packed_attention": ("LEAK_LIMIT", "enable_packing", "packing_leak", "takes_segment_lengths"),
    "samples": ("IGNORED",),
    "settings": ("DataSettings",),
    "table": ("TokenTable",),
    "template": ("DEFAULT_CHAT_TEMPLATE",),
    "tokens": ("Evaluated", "Prepared", "prepare", "prepare_evaluation"),
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: a process that only tokenises need not wait for torch."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
