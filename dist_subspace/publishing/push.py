"""`push`: an adapter, or a merged model, becomes a repository on the Hub. Local, one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import has_adapter
from dist_subspace.interchange.base_model import is_local
from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.interchange.description import read_description
from dist_subspace.publishing.card import published_card
from dist_subspace.publishing.contents import CARD, Contents, adapter_contents, kind_of, model_contents, outdated
from dist_subspace.publishing.repository import Repository


@dataclass(frozen=True)
class Pushed:
    """kind: adapter, or model. files: the names in the repository. left: files of the folder that stayed here."""

    name: str
    url: str
    kind: str
    files: tuple[str, ...]
    bytes: int
    left: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        use = f'dist_subspace.load_adapter(model, "{self.name}") reads it' if self.kind == "adapter" else self.url
        left = f"\nnot pushed: {', '.join(self.left)}" if self.left else ""
        size = f"{self.bytes / 2**20:,.1f} MiB"
        return f"{self.url}: {self.kind}, {len(self.files)} files, {size}; {use}{left}"


def push(
    folder: Path,
    repository: Repository,
    say: Callable[[str], None] = print,
    merged: Callable[[Path], Path] | None = None,
) -> Pushed:
    """Push a folder; nothing is written to the Hub before it is known to be whole.

    Arguments:
        folder: an adapter, a checkpoint, or a plain model.
        merged: makes the plain model of the adapter in a folder that it is given, and is called once the Hub has said that it
            will take it.

    Raises:
        UsageError: no adapter and no model, a name or a token that the Hub does not take, a repository of another kind.
    """
    repository.check()
    with TemporaryDirectory(prefix="dist-subspace-push-") as made:
        scratch = Path(made)
        contents = None if merged is not None else _contents(folder, scratch)
        there = repository.open()
        refuse_another_kind(repository, there, "model" if contents is None or not contents.is_adapter else "adapter")
        if merged is not None:
            contents = model_contents(merged(scratch / "model"))
        assert contents is not None
        files: dict[str, Path | bytes] = dict(contents.files)
        card = _card(repository, contents, there, say)
        files = {name: path for name, path in files.items() if name != CARD} | ({} if card is None else {CARD: card})
        kind = "adapter" if contents.is_adapter else "model"
        url = repository.commit(files, outdated(there, files), f"dist_subspace: {kind}")
        return Pushed(repository.name, url, kind, tuple(files), contents.bytes, contents.left)


def _contents(folder: Path, scratch: Path) -> Contents:
    return adapter_contents(folder, scratch) if has_adapter(folder) else model_contents(folder)


def refuse_another_kind(repository: Repository, there: list[str], kind: str) -> None:
    """An adapter beside a model's weights is read by some libraries as the one, by others as the other."""
    found, words = kind_of(there), {"model": "a whole model", "adapter": "an adapter"}
    if found not in (None, kind):
        raise UsageError(
            f"{repository.field} is {repository.name!r}, which holds {words[str(found)]}, and this is {words[kind]}; accepted: "
            "another name, or another --revision"
        )


def _card(repository: Repository, contents: Contents, there: list[str], say: Callable[[str], None]) -> bytes | None:
    """The card that is pushed; None where the one on the Hub stays, as a person has edited it there."""
    card = contents.files[CARD].read_text(encoding="utf-8") if CARD in contents.files else None
    if card is None:
        return None
    on_hub = repository.card() if CARD in there else None
    if on_hub is not None and not is_unedited(on_hub) and is_unedited(card):
        say(f"{CARD} of {repository.name} was edited, and stays as it is")
        return None
    described = read_description(contents.files["adapter_config.json"].parent) if contents.is_adapter else None
    base = None if described is None else described.get("base_model_name_or_path")
    license = repository.license_of(str(base)) if base and not is_local(str(base)) else None
    return published_card(card, repository.name, described, contents.export, license).encode()
