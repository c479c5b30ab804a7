"""What of a folder is pushed, under which name in the repository: an adapter as `load_adapter` reads it and, in `peft/`, as PEFT
reads it where that is another form; or a plain model. Never a checkpoint's optimizer, and no file that is not known. Local.

The adapter's own form is the repository's top level, as the place that `load_adapter("user/name")`, PEFT and vLLM all look at:
for a method that PEFT knows it is PEFT's form as well. Of another method that has an exact form there (SSL's scalings as IA3, a
spectral update as LoRA) that form lies in the folder `peft/`, which PEFT reads by `subfolder="peft"`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import complete_adapter
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.card_training import Training
from dist_subspace.interchange.card_usage import EXPORT
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS, read_description
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.peft.export import export_exactly
from dist_subspace.interchange.tokenizer_files import TEMPLATES, TOKENIZER_FILES, tokenizer_of, write_tokenizer
from dist_subspace.loading.index import weight_files
from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder, adapter_labels

CARD = "README.md"
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")
LABELS, PICTURE = adapter_labels(Path()).name, RunFolder("").picture.name
_OF_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Contents:
    """files: what is pushed, by its name in the repository. is_adapter: else it is a whole model. export: the description of the
    form for PEFT in `peft/`, where there is one. left: names of files that stay here."""

    files: dict[str, Path]
    is_adapter: bool
    export: dict[str, Any] | None = None
    left: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def adapter_contents(folder: Path, scratch: Path) -> Contents:
    """Of an adapter's folder or a checkpoint.

    Arguments:
        scratch: an empty folder for what is made here.

    Raises:
        UsageError: the adapter is not whole, or a checkpoint's factors are not there.
    """
    opened = AdapterFolder(folder, verify=True)
    source = _completed(folder, scratch / "completed") if opened.ours and _is_of_run(folder, opened) else folder
    files = _named(source, (CONFIG, OWN_CONFIG, WEIGHTS, LABELS, PICTURE, CARD))
    export = _exported(source, scratch / EXPORT) if opened.ours else None
    if export is not None:
        files |= {f"{EXPORT}/{name}": scratch / EXPORT / name for name in (CONFIG, WEIGHTS)}
    if CARD not in files:
        written = scratch / CARD
        written.write_text(model_card(read_description(source), Training(), export=export), encoding="utf-8")
        files[CARD] = written
    return Contents(files, True, export, _left(source, files))


def model_contents(folder: Path) -> Contents:
    """Of a plain transformers model, such as `merge` writes.

    Raises:
        UsageError: no such model, or one whose weights are not all there.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"PATH is {str(folder)!r}, which holds neither an adapter nor a model; looked for {CONFIG}, config.json"
        )
    weights = [file.name for file in weight_files(folder)]
    files = _named(folder, (*_OF_MODEL, *weights, CARD, *(file.name for file in folder.glob("*.py"))))
    return Contents(files, False, None, _left(folder, files))


def _is_of_run(folder: Path, opened: AdapterFolder) -> bool:
    """Whether something of it lies beside it: a checkpoint's factors and tokenizer are the run's."""
    return CheckpointFolder(folder).manifest.exists() or bool(opened.ours.get("factors"))


def _completed(checkpoint: Path, folder: Path) -> Path:
    complete_adapter(checkpoint, folder)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    labels = adapter_labels(RunFolder(checkpoint.resolve().parent).adapter)
    if labels.is_file():
        shutil.copyfile(labels, adapter_labels(folder))
    return folder


def _exported(source: Path, out: Path) -> dict[str, Any] | None:
    """The description of the adapter in PEFT's exact form, written into `out`; None where it has none, or it is its own."""
    try:
        made = export_exactly(source, out)
    except UsageError:
        return None
    if made.form == "direct":
        shutil.rmtree(out)
        return None
    described: dict[str, Any] = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    return described


def _named(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    known = (*names, *TOKENIZER_FILES, *_LICENSES)
    files = {name: folder / name for name in known if (folder / name).is_file()}
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    return files | {f"{TEMPLATES}/{file.name}": file for file in templates}


def _left(folder: Path, files: dict[str, Path]) -> tuple[str, ...]:
    sent = set(files.values()) | {folder / TEMPLATES}
    return tuple(sorted(path.name for path in folder.iterdir() if path not in sent and not path.name.startswith(".")))


def kind_of(names: Iterable[str]) -> str | None:
    """What a repository with files of these names holds: `adapter`, `model`, or None for neither."""
    listed = set(names)
    if CONFIG in listed:
        return "adapter"
    return "model" if any(name.endswith((".safetensors", ".bin")) and "/" not in name for name in listed) else None


def outdated(names: Iterable[str], files: Iterable[str]) -> list[str]:
    """Of the names in a repository, those of an earlier push that would be read beside these files: another form for PEFT,
    shards of another number, factors or labels of another method."""
    ours = (OWN_CONFIG, LABELS, _OF_MODEL[-1])
    kept = set(files)
    others = [name for name in names if name not in kept]
    return [
        n for n in others if n in ours or n.startswith(f"{EXPORT}/") or ("/" not in n and n.endswith(".safetensors"))
    ]
