"""An adapter that is named by its repository on the Hub, `user/name`, wherever a folder may be named."""

from __future__ import annotations

from pathlib import Path

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import has_adapter
from dist_subspace.interchange.description import CONFIG, WEIGHTS
from dist_subspace.loading.hub import TOKENIZER_FILES, cached, fetch, is_hub_name
from dist_subspace.loading.load import download

ADAPTER_FILES = (CONFIG, WEIGHTS, *TOKENIZER_FILES)


def adapter_here(path: str | Path, field: str) -> Path:
    """Local: a path as it is, and of a repository the copy in this machine's cache, fetched where the Hub has another.

    Arguments:
        field: what a refusal calls it.

    Raises:
        UsageError: the Hub does not give it, or it holds no adapter.
    """
    if not names_repository(path):
        return Path(path)
    return _with_adapter(fetch(str(path), field, ADAPTER_FILES), path, field)


def adapter_for_ranks(path: str | Path, field: str = "folder") -> Path:
    """Collective: as `adapter_here`, for ranks that all read it; one process of a node asks the Hub.

    Raises:
        UsageError: on every rank.
    """
    if not _may_be_repository(path):
        return Path(path)
    download(path, field, ADAPTER_FILES)
    return Path(path) if Path(path).exists() else _with_adapter(cached(str(path), ADAPTER_FILES), path, field)


def names_repository(path: str | Path) -> bool:
    """Whether it is `user/name`, and no path that is here."""
    return _may_be_repository(path) and not Path(path).exists()


def _may_be_repository(path: str | Path) -> bool:
    return is_hub_name(str(path)) and str(path).count("/") == 1


def _with_adapter(folder: Path | None, path: str | Path, field: str) -> Path:
    if folder is None or not has_adapter(folder):
        raise UsageError(
            f"{field} is {str(path)!r}, a repository without an adapter; accepted: one with {CONFIG} and {WEIGHTS}"
        )
    return folder
