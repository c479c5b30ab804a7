"""The files of a tokenizer, which go with an adapter and with a merged model. Local."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.interchange.base_model import run_model
from dist_subspace.loading.load import local_folder
from dist_subspace.loading.tokenizer import extend_tokenizer, load_tokenizer
from dist_subspace.run_folder.folder import RunFolder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    # Of single families: DeBERTa, RemBERT, SpeechT5, Marian, FSMT, ProphetNet, BERTweet, BARTpho, MyT5, LUKE, RoCBert, ...
    "spm.model",
    "sentencepiece.model",
    "spm_char.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "prophetnet.tokenizer",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "emoji.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of templates by name


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of an adapter: its folder, where it holds one, else that of the run whose checkpoint it is, new tokens
    included (a tokenizer, or a folder); None where neither is to be had."""
    run = folder.resolve().parent
    for place in (folder, RunFolder(run).adapter):
        if has_tokenizer(place) and (place == folder or run_model(run)):
            return place
    model = run_model(run)
    base = local_folder(model.get("path"), model.get("revision"))
    if base is None:
        return None
    if not model.get("tokenizer") and not model.get("new_tokens"):
        return base
    try:
        tokenizer = load_tokenizer(str(base), model.get("tokenizer"), bool(model.get("trust_remote_code")))
        extend_tokenizer(tokenizer, model.get("new_tokens") or [])
    except UsageError:
        return None
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Every file of a tokenizer that is there; none is renamed or changed."""
    copy_files(source, TOKENIZER_FILES, folder)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Those of the named files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer as its own files, or a copy of those in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, str | Path):
        copy_tokenizer(Path(tokenizer), folder)
    else:
        tokenizer.save_pretrained(folder)


def move_files(source: Path, folder: Path) -> None:
    """Everything in a folder into another, in the place of what has its name; the first is gone then."""
    for path in source.iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    source.rmdir()
