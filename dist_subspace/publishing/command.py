"""`dist-subspace push`: what a path is, and whether it is pushed as it is or merged first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_subspace.interchange.adapter_folder import AdapterFolder, has_adapter
from dist_subspace.interchange.merge import merge
from dist_subspace.interchange.plain import refuse_unmergeable
from dist_subspace.publishing.push import Pushed, push
from dist_subspace.publishing.repository import Repository
from dist_subspace.subspace import resolve


def push_path(
    path: str,
    repository: Repository,
    find: Callable[[str], Path],
    say: Callable[[str], None],
    merged: bool = False,
    base_model: str | None = None,
) -> Pushed:
    """Push a run, a checkpoint, an adapter, or a plain model.

    Arguments:
        find: the adapter that a path means, where it is no model's folder.
        merged: push the plain model that base and adapter make.
        base_model: as in `load_adapted`.

    Raises:
        UsageError: as `push`, `merge` and `load_adapted`.
    """
    repository.check()
    given = Path(path)
    if (given / "config.json").is_file() and not has_adapter(given):
        return push(given, repository, say)
    folder = find(path)
    if folder != given:
        say(f"pushing {folder}")
    if not merged:
        return push(folder, repository, say)
    opened = AdapterFolder(folder, verify=True)
    resolved = resolve(opened.config)
    refuse_unmergeable(resolved.info, resolved.settings)
    return push(folder, repository, say, partial(_merged, opened, base_model))


def _merged(adapter: AdapterFolder, base_model: str | None, out: Path) -> Path:
    from dist_subspace.api import load_adapted

    merge(load_adapted(adapter, base_model), out, tokenizer=adapter.tokenizer(), report=None)
    return out
