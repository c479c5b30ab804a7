"""What a path given by a user is: an adapter's folder, a checkpoint or a run, and what the files around it say. Local."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_subspace.checkpoint.store import newest_whole
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.description import CONFIG
from dist_subspace.interchange.hub_adapter import adapter_here
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.saved_config import saved_sections
from dist_subspace.training.data.settings import PROMPTS, DataSettings


@dataclass(frozen=True)
class Source:
    """adapter: the folder that holds it, ours or PEFT's; sections: of the configuration of the run that it is in, empty where it
    is in none."""

    adapter: AdapterFolder
    sections: Mapping[str, Mapping[str, Any]]

    def section(self, name: str) -> Mapping[str, Any]:
        return self.sections.get(name, {})

    def settings(self, **given: str | None) -> DataSettings:
        """How records became text in the training, with what is given in its place.

        Arguments:
            given: fields of DataSettings (`format`, `template`, ...); None says nothing.

        Raises:
            UsageError: nobody says what the format is.
        """
        known = dict(self.section("data")) or dict(self.adapter.ours.get(PROMPTS) or {})
        said = {name: value for name, value in given.items() if value is not None}
        if said.get("format", known.get("format")) != known.get("format"):
            known = {}
        known |= said
        if "format" not in known:
            raise UsageError(
                f"{str(self.adapter.path)!r} does not say how its prompts are written; accepted: a run, or a format (--format): "
                "alpaca, chat, completion or text"
            )
        return DataSettings.of_prompts(known)


def find_source(path: str | Path) -> Source:
    """The adapter that a path means.

    Raises:
        UsageError: there is none, or its files are no whole adapter.
    """
    folder = adapter_folder(path)
    return Source(AdapterFolder(folder, verify=True), saved_sections(folder.resolve().parent))


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter: the path itself, or of a run its final one, else that of the newest checkpoint; of a name on the
    Hub (`user/name`) the copy that is fetched.

    Raises:
        UsageError: there is none.
    """
    folder = adapter_here(path, "PATH")
    if not folder.is_dir():
        raise UsageError(
            f"PATH is {str(path)!r}, which is no folder; accepted: an adapter, a checkpoint, a run directory, or a name on "
            "the Hub"
        )
    if (folder / CONFIG).exists():
        return folder
    inner = RunFolder(folder).adapter
    if (inner / CONFIG).exists():
        return inner
    newest = newest_whole(folder, report=lambda sentence: print(sentence, file=sys.stderr))
    if newest is None:
        raise UsageError(
            f"PATH is {str(path)!r}, which holds no adapter; looked for {CONFIG} in it, in {inner.name}/ and in checkpoints"
        )
    return newest
