"""How an adapter names its base model, and where that model is found again. Local.

A hub name is kept, and so is a relative path, which leads to the base from where the training was started. Of an absolute path,
which means nothing to whoever gets the adapter, the folder's own name is kept, and words that PEFT and transformers show in
their error when they look for it. `./` says that it is a folder: they would take a bare `gpt2` for a model of the hub. What tells
whether a folder is the base that was trained beside is its fingerprint, which the adapter holds; where a base lies is remembered
on this machine, outside the adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import StorageError, write_text_atomic
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import OWN
from dist_subspace.run_folder.saved_config import saved_sections

FINGERPRINT = "base_fingerprint"  # of a base that is a folder, among our own entries
ELSEWHERE = (
    " (a folder of the machine where dist_subspace wrote this adapter: load the base model, and this adapter on it)"
)
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}")
_SNAPSHOT_WITHOUT_OWNER = re.compile(r"models--([^/]+)/snapshots/[0-9a-f]{40}")


def base_name(path: str | Path | None) -> str | None:
    """What an adapter's configuration calls the base that was loaded from `path`."""
    if not path:
        return None
    given = Path(path).expanduser()
    if not given.is_dir() and not is_local(str(path)):
        return str(path)
    of_hub = _hub_name(given)
    if of_hub:
        return of_hub
    if given.is_absolute():
        return f"./{given.name}{ELSEWHERE}"
    relative = Path(os.path.normpath(given)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def shown_name(path: str | Path) -> str:
    """What a person is shown of a place: the hub's name of a copy in this machine's cache, and any other path as it stands."""
    return _hub_name(Path(path)) or str(path)


def _hub_name(folder: Path) -> str | None:
    found = _SNAPSHOT.search(folder.as_posix()) or _SNAPSHOT_WITHOUT_OWNER.search(folder.as_posix())
    return "/".join(found.groups()) if found else None


def short_base(name: str) -> str:
    """The base's name without the words for other readers."""
    return name.removesuffix(ELSEWHERE)


def is_local(name: str) -> bool:
    """Whether a name can be a folder's only."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_base(folder: Path, described: Mapping[str, Any], fingerprint: Callable[[Path], str]) -> str:
    """The base of an adapter on this machine: a hub name as it is, else the first folder of the adapter's fingerprint among
    that of the run whose folder it is in, the path as it stands, one beside the adapter, and where this machine has seen it.

    Arguments:
        fingerprint: of a model folder; may raise UsageError for one that is none.

    Raises:
        UsageError: the adapter names no base, or its base is not found.
    """
    name = described.get("base_model_name_or_path")
    if not name:
        raise UsageError(
            f"{str(folder)!r} does not say which base model it is for; accepted: one that is given (base_model)"
        )
    wanted = (described.get(OWN) or {}).get(FINGERPRINT)
    others = []
    for place in _places(folder, str(name), wanted):
        if not place.is_dir():
            continue
        with suppress(UsageError):
            if wanted is None or fingerprint(place) == wanted:
                return str(place)
        others.append(str(place))
    if not is_local(str(name)) and not others:
        return str(name)  # of the hub, or wherever the loader looks
    beside = f" ({', '.join(dict.fromkeys(others))} is another model)" if others else ""
    raise UsageError(
        f"the adapter's base model is {short_base(str(name))!r}, which is no folder that is found here{beside}; accepted: "
        "the base model's folder or hub name (base_model, on the command line --base-model)"
    )


def _places(folder: Path, name: str, wanted: str | None) -> Iterator[Path]:
    """Folders that may be the base. Without a fingerprint a name alone says too little about one that it does not lead to."""
    short = Path(short_base(name)).expanduser()
    in_run = run_model(folder.resolve().parent).get("path")
    if in_run and base_name(in_run) == name:
        yield Path(str(in_run)).expanduser()
    if wanted is not None or short_base(name) == name:
        yield short
    if wanted is not None:
        yield folder.resolve().parent / short.name
        with suppress(OSError):
            yield Path(_memory(wanted).read_text(encoding="utf-8").strip())


def run_model(run: Path) -> dict[str, Any]:
    """The section `model` of RUN/config.yaml; empty where there is no run."""
    return saved_sections(run).get("model", {})


def identify_base(described: dict[str, Any], path: str | Path | None, identify: Callable[[Path], str] | None) -> None:
    """Put the fingerprint of a base that is a folder into a description, and remember here where it lies. A base that was moved,
    or that has no safetensors, is left without: its path is given later then."""
    if path and identify is not None and is_local(described.get("base_model_name_or_path") or ""):
        with suppress(OSError, UsageError):
            described[OWN][FINGERPRINT] = identify(Path(path).expanduser())
            remember_base(path, described[OWN][FINGERPRINT])


def remember_base(path: str | Path, fingerprint: str) -> None:
    """Keep on this machine where a base lies. A home that cannot be written to costs no more than giving the path later."""
    with suppress(OSError, StorageError):
        file = _memory(fingerprint)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, f"{Path(path).expanduser().resolve()}\n")


def _memory(fingerprint: str) -> Path:
    """In the user's cache; DIST_SUBSPACE_CACHE names another folder for it."""
    cache = (
        os.environ.get("DIST_SUBSPACE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dist_subspace"
    )
    return Path(cache).expanduser() / "base_models" / fingerprint
