"""In which bytes a frozen matrix is held. Knows torch and bitsandbytes; knows neither methods nor ZeRO."""

from dist_subspace.storage.adopt import adopt, adopt_all, left_alone, replace
from dist_subspace.storage.grouped import AT_ONCE
from dist_subspace.storage.linear_layers import is_conv1d, is_linear, linear_shape
from dist_subspace.storage.operator import FrozenLinear, Origin
from dist_subspace.storage.packed import PackedLinear
from dist_subspace.storage.pieces import FlatTensor, PieceWise
from dist_subspace.storage.registry import StorageInfo, discover, options_for, pack, storage_info, storages
from dist_subspace.storage.stack import ExpertOperator, FrozenStack, adopt_stack, pack_stack

__all__ = [
    "AT_ONCE",
    "ExpertOperator",
    "FlatTensor",
    "FrozenLinear",
    "FrozenStack",
    "Origin",
    "PackedLinear",
    "PieceWise",
    "StorageInfo",
    "adopt",
    "adopt_all",
    "adopt_stack",
    "is_conv1d",
    "is_linear",
    "left_alone",
    "linear_shape",
    "options_for",
    "pack",
    "pack_stack",
    "replace",
    "storage_info",
    "storages",
]

discover(__path__)
del discover
