"""What an adapter's folder says about it, in two files: `adapter_config.json`, whose every entry is PEFT's, and
`dist_subspace.json` beside it with what PEFT has no entry for. In memory they are one mapping, ours under `dist_subspace`. Local.

Folders that were written before had ours inside `adapter_config.json`; they are read alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OWN_CONFIG = "dist_subspace.json"
OWN = "dist_subspace"
STACKS = "stacks"  # our entry with the shapes of stacks of experts
TURNED = "stacks_turned_in_peft"  # our entry with those whose layout PEFT takes for the other one
FORMAT = 1

# PEFT looks a `peft_type` up in a table, and its error, and so transformers', is a KeyError that shows what was looked up.
NOT_PEFT = "DIST_SUBSPACE_ADAPTER"


def not_peft(method: str) -> str:
    """The `peft_type` of an adapter that PEFT would not compute as we do: the one word of PEFT's own error."""
    return (
        f"{NOT_PEFT}: a {method} adapter of dist_subspace, which PEFT cannot compute; load it by dist_subspace.load_adapter("
        "model, folder), or write it for PEFT or transformers by `dist-subspace export` or `dist-subspace merge`"
    )


def config_texts(described: Mapping[str, Any]) -> dict[str, str]:
    """The files of a description by name, in the order in which they must appear: PEFT's, which makes a folder an adapter, last.

    An adapter of PEFT's own has no entries of ours, and no file of them.
    """
    theirs = {key: value for key, value in described.items() if key != OWN}
    ours = described.get(OWN)
    if ours is not None and not theirs.get("peft_type"):
        theirs["peft_type"] = not_peft(str(ours.get("method")))
    files = {OWN_CONFIG: ours, CONFIG: theirs} if ours is not None else {CONFIG: theirs}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def read_description(folder: Path) -> dict[str, Any]:
    """The description of an adapter in either layout; without the entry `dist_subspace` where PEFT wrote it.

    Raises:
        UsageError: a file of it that is no JSON object, or one that is missing. FileNotFoundError: no adapter_config.json.
    """
    described = _read(folder / CONFIG)
    kind = str(described.get("peft_type") or "")
    if kind.startswith(NOT_PEFT):
        described["peft_type"] = None
    # PEFT, which says its version, may have saved another adapter over one of ours: its file then stands for itself.
    if (folder / OWN_CONFIG).exists() and described.get("peft_version") is None:
        described[OWN] = _read(folder / OWN_CONFIG)
    elif kind.startswith(NOT_PEFT):
        raise UsageError(f"{str(folder)!r} holds no whole adapter: {OWN_CONFIG} is missing; copy the folder again")
    return described


def own_entries(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Our own entries of a description.

    Raises:
        UsageError: there are none, or they are of a format that another version of this package writes.
    """
    ours = described.get(OWN)
    if not isinstance(ours, dict):
        raise UsageError(
            f"{folder / CONFIG} was not written by dist_subspace (peft_type {described.get('peft_type')!r}); accepted: "
            "import_peft, or `dist-subspace import`, for an adapter of PEFT"
        )
    if ours.get("format") != FORMAT:
        raise UsageError(
            f"{folder / CONFIG} is of format {ours.get('format')!r}; this version reads format {FORMAT}: read it with the "
            "version that wrote it"
        )
    return ours


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        damage = f"{file} is not JSON at line {error.lineno}: {error.msg}"
        raise UsageError(f"{str(file.parent)!r} holds no whole adapter ({damage}); copy it again") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{str(file.parent)!r} holds no whole adapter ({file} is not UTF-8 text); copy it again"
        ) from error
    if not isinstance(read, dict):
        raise UsageError(f"{file} was not written by dist_subspace, nor by PEFT: it is no JSON object")
    return read
