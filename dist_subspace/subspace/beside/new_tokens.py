"""Tokens that the base does not know: their rows of the embedding and of the head are trained beside the frozen tables.

    x = E[t],  for a new token t:  x = N[t];        logits = [H h, M h]

N and M `(m, d)` begin at the mean of the rows that there are. A head that shares the embedding's table shares N too. Ids inside
the base's vocabulary (reserved ones) have their rows replaced, others follow it; new tokens have no bias. Frozen tables stay as
they are, so that nothing is copied, whoever splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import text_config
from dist_subspace.families.embeddings import input_embeddings
from dist_subspace.subspace.core.trained import Gathered, TrainedBeside

ROWS = 4096  # of a table, summed at a time in float32


class NewTokens(TrainedBeside):
    """The rows of new tokens, float32, equal on every rank; whole for whoever calls this module, which hooks on the tables do.

    ids: `(m,)` ascending; known: the same numbers on the host.
    base_vocabulary, vocabulary: tokens of the base, and of the model with the new ones.
    tables: the base's tensors that are larger in a model with the new tokens, by name, and which rows they get.
    """

    ids: Tensor
    embedding: nn.Parameter
    head: nn.Parameter | None

    def __init__(self, model: Any, ids: Sequence[int], gathered: Gathered) -> None:
        """Collective where parameters are split: the tables are read, and hooked but for the head."""
        super().__init__()
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.base_vocabulary = _vocabulary(model)
        self.inside = sum(i < self.base_vocabulary for i in ids)
        self.vocabulary = self.base_vocabulary + len(ids) - self.inside
        device = table.weight.device
        self.known = tuple(sorted(ids))
        self.register_buffer("ids", torch.tensor(self.known, device=device), persistent=False)
        self.embedding = nn.Parameter(_mean_row(table, gathered).to(device).repeat(len(ids), 1))
        self.tied = head is not None and any(p is table.weight for p in head.parameters())
        own_head = head is not None and not self.tied
        self.register_parameter(
            "head", nn.Parameter(_mean_row(head, gathered).to(device).repeat(len(ids), 1)) if own_head else None
        )
        self.tables = _tables(model)
        self._sized = _with_vocabulary_size(model)
        self._asked: list[Tensor] = []
        self.enabled = True
        self._connect_tables(model)

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Losses are taken over as many classes as the model says that its vocabulary has."""
        self._enabled = value
        for holder in self._sized:
            holder.vocab_size = self.vocabulary if value else self.base_vocabulary

    def _connect_tables(self, model: Any) -> None:
        """Before anything else that changes what the embedding gives. Several modules may hold the one table."""
        weight = model.get_input_embeddings().weight
        for module in [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]:
            module.register_forward_pre_hook(self._before_table)
            module.register_forward_hook(self._after_table)

    def connect_head(self, model: Any) -> None:
        """After the head may have been replaced by a method's layer."""
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_hook(self._after_head)

    def forward(self, x: Tensor) -> Tensor:
        """Places in `ids` to embeddings, `(...)` to `(..., d)`; or hidden states to logits, `(..., d)` to `(..., m)`."""
        if not x.is_floating_point():
            return self.embedding[x]
        return linear(x, (self.embedding if self.head is None else self.head).to(x.dtype))

    # Merging.

    def plain_module(self) -> None:
        """Its rows go into the tables."""

    def parameters_for(self, name: str) -> tuple[nn.Parameter, ...]:
        """What must be whole for `enlarged(name, ...)`."""
        rows = self._rows(name)
        return () if rows is None else (rows,)

    def enlarged_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the base's tensor of that name has in a model with the new tokens."""
        return (self.vocabulary, *shape[1:]) if name in self.tables else tuple(shape)

    def enlarged(self, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor of that name, `(V, d)` or a bias `(V,)`, as a plain model with the new tokens has it."""
        if name not in self.tables:
            return tensor
        rows = self._rows(name)
        larger = pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, self.vocabulary - self.base_vocabulary))
        values = 0.0 if rows is None else rows.detach().to(larger.device, larger.dtype)
        larger[self.ids.to(larger.device)] = values
        return larger

    def _rows(self, name: str) -> nn.Parameter | None:
        kind, head = self.tables.get(name), self.embedding if self.head is None else self.head
        return self.embedding if kind == "embedding" else head if kind == "head" else None

    # The hooks.

    def _before_table(self, table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        ids = args[0]
        if not self.enabled:
            if self.vocabulary > self.base_vocabulary and bool((ids >= self.base_vocabulary).any()):
                raise UsageError(
                    f"the input has token {int(ids.max())}, which the base alone does not know: it has {self.base_vocabulary}"
                )
            return None
        self._asked.append(ids)
        return (ids.masked_fill(ids >= self.base_vocabulary, 0), *args[1:])

    def _after_table(self, table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._asked:
            return None
        asked = self._asked.pop()
        ids = self.ids.to(asked.device)
        place = torch.searchsorted(ids, asked.contiguous()).clamp(max=len(ids) - 1)
        rows = self(place).to(output.device, output.dtype)
        scale = getattr(table, "embed_scale", None)  # of embeddings that multiply what their table holds
        rows = rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((ids[place] == asked).unsqueeze(-1), rows, output)

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        return self.joined(output, self(args[0]))

    def joined(self, logits: Tensor, fresh: Tensor) -> Tensor:
        """Logits `(..., V)` of the base with those of the new tokens, `(..., m)`, at their ids."""
        fresh = fresh.to(logits.dtype)
        if self.inside:
            logits = logits.index_copy(-1, self.ids[: self.inside].to(logits.device), fresh[..., : self.inside])
        return torch.cat([logits, fresh[..., self.inside :]], dim=-1)


def check_ids(ids: Sequence[Any]) -> None:
    """Raises UsageError for what cannot be ids of new tokens."""
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise UsageError(f"subspace.new_tokens is {list(ids)!r}; accepted: token ids, each once")


def check_new_tokens(model: Any, ids: Sequence[int], saved: Sequence[str]) -> None:
    """Local: whether the model can have them.

    Arguments:
        saved: names of the modules that are trained in full.

    Raises:
        UsageError: for ids that leave a gap behind the vocabulary, tables without rows, and tables that are trained in full.
    """
    vocabulary = _vocabulary(model)
    above = sorted(i for i in ids if i >= vocabulary)
    if above != list(range(vocabulary, vocabulary + len(above))):
        raise UsageError(
            f"subspace.new_tokens has {above} above the base's vocabulary of {vocabulary}; accepted: ids that follow it without "
            "a gap"
        )
    in_full = [name.removesuffix(".weight") for name in _tables(model) if name.removesuffix(".weight") in saved]
    if in_full:
        raise UsageError(
            f"subspace.modules_to_save trains {in_full[0]} in full, and there are new tokens; accepted: one of the two"
        )


def _vocabulary(model: Any) -> int:
    table, head = input_embeddings(model), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        kind = "none" if table is None else type(table).__name__
        raise UsageError(f"new tokens need an embedding table, and {type(model).__name__} has {kind}")
    outputs = getattr(head, "out_features", table.num_embeddings)
    if outputs != table.num_embeddings:
        raise UsageError(f"new tokens need a head of the embedding's {table.num_embeddings} tokens, not of {outputs}")
    return table.num_embeddings


def _mean_row(module: Any, gathered: Gathered) -> Tensor:
    """Collective where the module is split: `(d,)` float32, the mean over the rows of an embedding or a head."""
    with gathered(list(module.parameters())), torch.no_grad():
        if not getattr(module, "is_float", True):  # decoded a few rows at a time
            pieces = [p.rows.sum(0, dtype=torch.float64) for p in module.row_pieces(torch.float32)]
            mean: Tensor = torch.stack(pieces).sum(0) / module.out_features
            return mean.float()
        weight = getattr(module, "weight", None)
        if weight is None or getattr(module, "transposed", False):
            weight = module.dense(torch.float32)
        sums = [part.float().sum(0, dtype=torch.float64) for part in weight.split(ROWS)]
        return (torch.stack(sums).sum(0) / len(weight)).float()


def _tables(model: Any) -> dict[str, str]:
    """The base's tensors that have a row for each token, by every name that they have."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = not getattr(head, "is_float", True)  # under whatever name: as a plain model calls it
    kinds = {
        id(getattr(head, "bias", None)): "bias",
        id(None if packed else getattr(head, "weight", None)): "head",
        id(table.weight): "embedding",
    }
    named = model.named_parameters(remove_duplicate=False)
    tables = {name: kinds[id(parameter)] for name, parameter in named if id(parameter) in kinds}
    heads = [name for name, module in model.named_modules(remove_duplicate=False) if packed and module is head]
    return tables | {f"{name}.weight": "head" for name in heads}


def _with_vocabulary_size(model: Any) -> list[Any]:
    """The configurations, and the model, where they say how large the vocabulary is."""
    holders = [model.config, text_config(model.config), model]
    return [h for n, h in enumerate(holders) if hasattr(h, "vocab_size") and all(h is not o for o in holders[:n])]
