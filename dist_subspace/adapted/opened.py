"""An adapter on its base, on every rank: whole on each, or split over them as it was in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_subspace.adapted.source import Source, find_source
from dist_subspace.api import base_options, load_adapted
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.generation.room import positions
from dist_subspace.interchange.base_model import FINGERPRINT
from dist_subspace.interchange.hub_adapter import adapter_for_ranks
from dist_subspace.loading.computation_type import unset_type
from dist_subspace.loading.load import local_folder, resolve_dtype
from dist_subspace.loading.positions import count_from
from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.placement.collectives import agreed, world
from dist_subspace.placement.engines import compute_device, largest_block, preset_for_use, start_use, use_config
from dist_subspace.storage import storage_info
from dist_subspace.training.data.settings import DataSettings

_OF_THE_RUN = ("attn_implementation", "trust_remote_code", "experts_at_once")
_SOME_TOKENS = 16  # of a row, from which is read at which position a family's rows begin


@dataclass(frozen=True)
class Opened:
    """model: the base with the adapter on it, in evaluation mode, the same transformers model on every rank; base: where the base
    lies; preset: how it is placed; close: collective where the model is split, ends what gathers its weights."""

    model: Any
    tokenizer: Any
    source: Source
    base: str
    preset: str
    close: Callable[[], None]

    def settings(self, **given: str | None) -> DataSettings:
        """How prompts are written (`Source.settings`)."""
        return self.source.settings(**given)


def open_adapted(
    path: str | Path,
    *,
    base_model: str | Path | None = None,
    storage: str | None = None,
    preset: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Opened:
    """Collective where there are several ranks, whose process group is made already: the adapter that a path means, on its base.

    Arguments:
        path: a run, a checkpoint or an adapter, ours or PEFT's.
        base_model: a folder or hub name; unset: the one that the adapter names.
        storage: of the frozen weights; unset: that of the training.
        preset: one of `deepspeed.preset`; unset: the training's split and offloading (`preset_for_use`).
        progress: called with (bytes of the base that have been read, bytes in all).

    Raises:
        UsageError: on every rank; no adapter, no base, another base than the adapter's, a placement that is not possible here.
    """
    path = adapter_for_ranks(path, "PATH")
    with agreed("looking for the adapter"):
        source = find_source(path)
        base = str(base_model or source.adapter.find_base(base_fingerprint))
        if base_model is not None:
            _check_base(source, base)
        options = base_options(source.adapter, base, storage)
        model_section, deepspeed = source.section("model"), source.section("deepspeed")
        more = {name: model_section[name] for name in _OF_THE_RUN if model_section.get(name) is not None}
        preset = preset or preset_for_use(deepspeed.get("preset"), deepspeed.get("config"), world().size)
    more["dtype"] = used_type(options["storage"], options["dtype"], preset)
    facts = {
        "nvme_path": deepspeed.get("nvme_path"),
        "dtype": str(more["dtype"]).removeprefix("torch."),
        "storage": options["storage"],
        "unquantised": storage_info(options["storage"]).dtype is not None,
    }
    config = use_config(preset, **facts)
    model: Any = load_adapted(source.adapter, base, storage, deepspeed=config, progress=progress, **more)
    close = start_use(model, config and use_config(preset, **facts, block_numel=largest_block(model)))
    model.requires_grad_(False).eval()
    count_from(model, positions(model, _SOME_TOKENS).first)
    with agreed("reading the tokenizer"):
        tokenizer = tokenizer_of(source, base, options["revision"])
    return Opened(model, tokenizer, source, base, preset, close)


def used_type(storage: str, dtype: str | None, preset: str) -> torch.dtype:
    """Collective: the type of the computation of a model that is used, the same on all ranks."""
    if dtype is not None:
        return resolve_dtype(storage, dtype)
    return unset_type(storage, compute_device(preset, None), together=True)


def tokenizer_of(source: Source, base: str, revision: str | None = None) -> Any:
    """Local: the adapter's tokenizer, new tokens included, or its base's."""
    found = source.adapter.tokenizer()
    if found is not None and not isinstance(found, Path):
        return found
    folder = found or local_folder(base, revision) or Path(base)
    return load_tokenizer(str(folder), None, bool(source.section("model").get("trust_remote_code")))


def _check_base(source: Source, base: str) -> None:
    wanted, folder = source.adapter.ours.get(FINGERPRINT), local_folder(base)
    if wanted is not None and folder is not None and base_fingerprint(folder) != wanted:
        raise UsageError(
            f"base_model is {base!r}, which is another model than the one that {str(source.adapter.path)!r} was trained on; "
            "accepted: that one"
        )
