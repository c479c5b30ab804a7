"""The model that is measured, on every rank: an adapter on its base, or a base alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_subspace.adapted.opened import open_adapted, used_type
from dist_subspace.errors import UsageError
from dist_subspace.evaluation.subject import Subject
from dist_subspace.families.configuration import text_config
from dist_subspace.generation.room import positions
from dist_subspace.loading.hub import TOKENIZER_FILES
from dist_subspace.loading.load import download, fresh_modules, load_frozen, resolve_dtype, resolve_folder
from dist_subspace.loading.positions import count_from
from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.placement.collectives import agreed, world
from dist_subspace.placement.engines import largest_block, preset_for_use, start_use, use_config
from dist_subspace.storage import storage_info
from dist_subspace.subspace import attachment
from dist_subspace.training.vocabulary import usable_pad_id

Progress = Callable[[int, int], None]
_SOME_TOKENS = 16  # of a row, from which is read at which position a family's rows begin


@dataclass(frozen=True)
class Subjected:
    """A model that is called and not trained. rows: of its embedding, None where nobody says; new_ids: of tokens that the adapter
    has brought; pad_id: what pads a row; preset: how it is placed; close: collective where it is split."""

    model: Any
    tokenizer: Any
    base: str
    preset: str
    rows: int | None
    new_ids: tuple[int, ...]
    pad_id: int
    close: Callable[[], None]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def open_subject(subject: Subject, progress: Progress, notice: Callable[[str], None]) -> Subjected:
    """Collective: what is measured, loaded; whole on each rank, or split over them.

    Raises:
        UsageError: on every rank; what cannot be loaded here.
    """
    if subject.adapter is None:
        model, tokenizer, base, preset, close = _open_base(subject, progress)
    else:
        opened = open_adapted(
            subject.adapter,
            base_model=subject.base,
            storage=subject.storage,
            preset=subject.preset,
            progress=progress,
        )
        model, tokenizer, base = opened.model, opened.tokenizer, opened.base
        preset, close = opened.preset, opened.close
    held = attachment(model)
    new_ids = () if held is None else tuple(held.config.new_tokens)
    rows = getattr(text_config(model.config), "vocab_size", None)
    pad_id = usable_pad_id(tokenizer, rows, new_ids, notice)
    return Subjected(model, tokenizer, base, preset, rows, new_ids, pad_id, close)


def _open_base(subject: Subject, progress: Progress) -> tuple[Any, Any, str, str, Callable[[], None]]:
    section = subject.config.model
    download(section.path, revision=section.revision)
    if section.tokenizer is not None:
        download(section.tokenizer, "model.tokenizer", TOKENIZER_FILES)
    with agreed("reading the tokenizer"):
        resolve_dtype(section.storage, section.dtype)
        tokenizer = load_tokenizer(
            str(resolve_folder(section.path, section.revision)), section.tokenizer, section.trust_remote_code
        )
        preset = subject.preset or preset_for_use(None, None, world().size)
    dtype = used_type(section.storage, section.dtype, preset)
    facts: dict[str, Any] = {
        "nvme_path": subject.config.deepspeed.nvme_path,
        "dtype": str(dtype).removeprefix("torch."),
        "storage": section.storage,
        "unquantised": storage_info(section.storage).dtype is not None,
    }
    config = use_config(preset, **facts)
    model: Any = load_frozen(
        section.path,
        storage=section.storage,
        double_quant=section.double_quant and not facts["unquantised"],
        storage_options=section.storage_options,
        head_storage=section.head_storage,
        deepspeed=config,
        task=section.task,
        dtype=dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        experts_at_once=section.experts_at_once,
        revision=section.revision,
        progress=progress,
    )
    if section.task == "classification" and (lacking := fresh_modules(model)):
        raise UsageError(
            f"--base is {section.path!r}, whose checkpoint has no {lacking[0]}: it would be drawn by chance; accepted: "
            "an adapter, or a model that classifies"
        )
    close = start_use(model, config and use_config(preset, **facts, block_numel=largest_block(model)))
    model.requires_grad_(False).eval()
    count_from(model, positions(model, _SOME_TOKENS).first)
    return model, tokenizer, section.path, preset, close
