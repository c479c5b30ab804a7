"""The module that turns token ids into vectors, where a model has one."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embeddings(model: Any) -> nn.Module | None:
    """What the model says it is, or None: a model may have no such method, may not implement it (CANINE hashes characters into
    several tables), or may name something that is no module (Perceiver's latents, a bare parameter)."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None
