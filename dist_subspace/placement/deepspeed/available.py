"""Whether DeepSpeed can be imported here."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def deepspeed_is_missing() -> str | None:
    """Why DeepSpeed cannot be imported; None where it can. Imports it."""
    try:
        importlib.import_module("deepspeed")
    except Exception as error:  # a build for another torch or compiler fails in many ways
        return f"{type(error).__name__}: {error}"
    return None
