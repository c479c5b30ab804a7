"""Data of a training run: files or Hub data sets -> tokens on disk -> global batches that are functions of the step."""

from dist_subspace.training.data.batches import Batches, GlobalBatch, eval_batches, eval_filler
from dist_subspace.training.data.collate import MicroBatch
from dist_subspace.training.data.cutting import Cutting
from dist_subspace.training.data.packed_attention import LEAK_LIMIT, enable_packing, packing_leak, takes_segment_lengths
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.table import TokenTable
from dist_subspace.training.data.template import DEFAULT_CHAT_TEMPLATE
from dist_subspace.training.data.tokens import Prepared, prepare

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "IGNORED",
    "LEAK_LIMIT",
    "Batches",
    "Cutting",
    "DataSettings",
    "GlobalBatch",
    "MicroBatch",
    "Prepared",
    "TokenTable",
    "enable_packing",
    "eval_batches",
    "eval_filler",
    "packing_leak",
    "prepare",
    "takes_segment_lengths",
]
