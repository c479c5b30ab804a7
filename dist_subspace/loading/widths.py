"""How wide the layers of a model are, before a weight of it is read."""

from __future__ import annotations

from torch import nn

from dist_subspace.families.blocks import block_prefixes
from dist_subspace.families.embeddings import input_embeddings
from dist_subspace.families.heads import head_names
from dist_subspace.families.towers import is_unreached, unreached
from dist_subspace.storage.linear_layers import is_linear, linear_shape


def linear_inputs(model: nn.Module) -> dict[str, int]:
    """The number of inputs of each linear layer of the blocks that text reaches, by name; of a model that has none there, of each
    outside its head, and of one that has none at all, of its embeddings."""
    apart, head, inside = unreached(model), head_names(model), block_prefixes(model)
    linear = {
        name: linear_shape(module)[1]
        for name, module in model.named_modules()
        if is_linear(module) and name not in head and not is_unreached(name, apart)
    }
    widths = {name: inputs for name, inputs in linear.items() if name.startswith(inside)} or linear
    table = input_embeddings(model)
    if not widths and isinstance(table, nn.Embedding):
        return {"embeddings": table.embedding_dim}
    return widths
