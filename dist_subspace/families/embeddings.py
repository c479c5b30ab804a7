"""The module that turns token ids into vectors, and the one that turns vectors into logits, where a model has them."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embeddings(model: Any) -> nn.Module | None:
    """What the model says it is, or None: a model may have no such method, may not implement it (CANINE hashes characters into
    several tables), or may name something that is no module (Perceiver's latents, a bare parameter)."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def output_embeddings(model: Any) -> nn.Module | None:
    """A language model's output layer, as the model says; None for models of other tasks."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
