"""The module that turns token ids into vectors, and the one that turns vectors into logits, where a model has them."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What the model says it is, or None: a model may have no such method, may not implement it (CANINE hashes characters into
    several tables), or may name something that is no module (Perceiver's latents, a bare parameter)."""
    tell = getattr(model, "get_input_embeddings", None)
    if tell is None:
        return None
    try:
        embeddings = tell()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """A language model's output layer, as the model says; None for models of other tasks."""
    tell = getattr(model, "get_output_embeddings", None)
    return None if tell is None else tell()
