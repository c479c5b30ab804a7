"""Which key of a checkpoint holds a parameter of the model.

A checkpoint of a bare body lacks the head model's prefix (`h.0...` for `transformer.h.0...`), one of a head model has it
when the body alone is wanted, and old ones call a norm's parameters gamma and beta.
"""

from __future__ import annotations

from collections.abc import Collection

_OLD_NORMS = ((".weight", ".gamma"), (".bias", ".beta"))


def checkpoint_key(name: str, keys: Collection[str], prefix: str) -> str | None:
    """The key in `keys` that holds the parameter called `name`, or None."""
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(prefix + "."), f"{prefix}.{name}"]
    for new, old in _OLD_NORMS:
        candidates += [c.removesuffix(new) + old for c in list(candidates) if c.endswith(new)]
    return next((candidate for candidate in candidates if candidate in keys), None)
