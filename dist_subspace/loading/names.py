"""Which key of a checkpoint holds a parameter of the model.

A checkpoint of a bare body lacks the head model's prefix (`h.0...` for `transformer.h.0...`), and one of a head model has it
when the body alone is wanted. What a family itself renamed, transformers says (`transformers_internals.renamed_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping


def checkpoint_key(name: str, keys: Mapping[str, str], prefix: str) -> str | None:
    """The key that holds the parameter called `name`, or None.

    Arguments:
        keys: each key's name in the model -> the key itself.
        prefix: the name under which a model with a head holds its body.
    """
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(prefix + "."), f"{prefix}.{name}"]
    return next((keys[candidate] for candidate in candidates if candidate in keys), None)
