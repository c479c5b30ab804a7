"""Reading a DeepSpeed configuration, and the one thing in it that decides where weights live."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError


def read_deepspeed(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict of its own.

    Raises:
        UsageError: no such file, not JSON (the line is named), or not a mapping.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    try:
        loaded = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"deepspeed.config is {str(source)!r}, which cannot be read ({reason})") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"deepspeed.config is {str(source)!r}, which is not JSON at line {error.lineno}: {error.msg}"
        ) from error
    if not isinstance(loaded, dict):
        raise UsageError(f"deepspeed.config is {str(source)!r}, which holds no mapping; accepted: a DeepSpeed JSON")
    return loaded


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 where none is named.

    Raises:
        UsageError: a stage that does not exist.
    """
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, Mapping) else section
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UsageError(f"deepspeed.config zero_optimization.stage is {stage!r}; accepted: 0, 1, 2, 3")
    return int(stage)
