"""`merge`: a base and its adapter become one plain transformers checkpoint, a layer at a time.

Written from the failure backwards: everything goes into a hidden folder beside the target, which gets its name by one rename
after every byte is on disk. A process that dies leaves no folder of that name; what is hidden, the next merge clears away.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dist_subspace.atomic_files import begin_folder, hidden_folder, publish_folder, storage_error
from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.families.configuration import BIAS_SWITCHES
from dist_subspace.interchange.model_card import merged_card
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.plain import Drift, Entry, each_once, plain_entries
from dist_subspace.interchange.tokenizer_files import copy_files, has_tokenizer, write_tokenizer
from dist_subspace.interchange.weights import Planned, WeightsWriter
from dist_subspace.loading.load import DTYPES, source_folder
from dist_subspace.loading.transformers_internals import (
    SplitStack,
    expected_parameters,
    expected_ties,
    misread,
    say_untied,
    split_stacks,
    written_keys,
)
from dist_subspace.notices import say
from dist_subspace.placement.collectives import agreed, all_here, broadcast_object, on_main, world
from dist_subspace.placement.tensors import whole_on_main
from dist_subspace.subspace import attached

SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how far the two bases are apart.

    drift: `‖Ŵ - W‖ / ‖W‖` (Frobenius) of each quantised layer, Ŵ the weight of the forward, W the checkpoint's own; total_drift:
    the same over all these layers as one; unknown: quantised layers whose original is not to be had.
    """

    folder: str
    method: str
    base: str
    dtype: str
    tensors: int
    files: int
    bytes: int
    drift: Mapping[str, float]
    total_drift: float | None
    unknown: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.tensors} tensors, {self.bytes / 2**20:,.1f} MiB in {self.files} file(s), {self.dtype}; "
            f"{self.method} merged into the {self.base} base"
        ]
        if self.total_drift is not None:
            worst = max(self.drift, key=lambda name: self.drift[name])
            lines.append(
                f"drift between the two bases, |dequantised - original| / |original|: {self.total_drift:.3e} over "
                f"{len(self.drift)} layers, at most {self.drift[worst]:.3e} ({worst})"
            )
        elif self.unknown:
            lines.append(
                f"drift between the two bases: unknown, the originals of {self.unknown} layers are not to be had"
            )
        else:
            lines.append("drift between the two bases: none, no layer is quantised")
        return "\n".join(lines)


def merge(
    model: nn.Module,
    folder: str | Path,
    base: str = "dequantised",
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    patience: float = 60.0,
    report: Callable[[str], None] | None = print,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Collective: write the merged model as a plain transformers checkpoint; rank 0 alone writes, a layer at a time.

    No rank holds more than it holds already, besides rank 0: one layer's gathered bytes and a few float32 copies of its matrix.

    Arguments:
        folder: the checkpoint's folder, which must not exist or be empty.
        base: what the update is merged into: `dequantised`, the weight that the forward used, or `original`, the checkpoint's
            own, read again. How far the two are apart is measured for every quantised layer, and reported.
        dtype: of the written weights (float32, bfloat16, float16); unset: the type that the model computes in.
        tokenizer: a folder whose tokenizer files are copied, or a tokenizer; unset: the base model's files, where it has some
            and they know every token of the adapter.
        max_shard_bytes: of one safetensors file.
        patience: seconds to wait for ranks that have not called it.
        report: called on rank 0 with the report's text.
        progress: called on rank 0 with (tensors written, tensors in all); what it raises ends the merge on every rank.

    Raises:
        UsageError: a method that cannot be merged, an original that is not to be had, a folder that holds something, too
            little space on its disk, a value that `dtype` cannot hold, ranks that have not called it.
        StorageError: the disk refuses. Nothing half-written is left behind.
    """
    all_here("merge", patience)
    with agreed("planning the merge"):
        target, drift, kind = Path(folder), Drift(base), _dtype(dtype, model)
        config, written = _plain_model(model, drift, kind)
        plan = [planned for entry in written for planned in entry.planned]
    hidden = hidden_folder(target)
    writer = WeightsWriter(hidden, plan, max_shard_bytes)
    try:  # before the folder is made: a signal may come at any moment
        on_main(begin_folder, target, sum(tensor.bytes for tensor in plan))
        for done, entry in zip(accumulate(len(entry.planned) for entry in written), written, strict=True):
            _write(writer, entry, None if progress is None else partial(progress, done, len(plan)))
        on_main(_finish, writer, hidden, target, config, model, tokenizer)
    except BaseException:
        _give_up(writer)
        raise
    made = broadcast_object(_report(target, model, kind, plan, len(writer.names), drift))
    if report is not None and world().is_main:
        report(str(made))
    return made


@dataclass(frozen=True)
class _Written:
    """An entry, and the tensors that it is in the file: one, or where `split` makes them of it, each expert's."""

    entry: Entry
    planned: tuple[Planned, ...]
    split: SplitStack | None = None


def _plain_model(model: nn.Module, drift: Drift, dtype: torch.dtype) -> tuple[Any, list[_Written]]:
    """The configuration of the plain model, and what is written of it, each tensor once.

    Raises:
        UsageError: as `plain_entries`, `_plain_config` and `_refuse_misread`.
    """
    tied = plain_entries(model, drift, dtype)
    config, zeros, ties = _plain_config(model, tied, dtype)
    entries = [*each_once(tied, ties), *zeros]
    keys = written_keys(model, [entry.name for entry in entries])
    splits = split_stacks(model, config, {entry.name: entry.shape for entry in entries if not entry.as_one})
    written = []
    for entry in entries:
        split = splits.get(entry.name)
        if split is None:
            written.append(_Written(entry, (Planned(keys[entry.name], entry.shape, entry.dtype),)))
        else:
            shapes = {key: tuple(t.shape) for key, t in split(torch.empty(entry.shape, device="meta")).items()}
            planned = tuple(Planned(key, shape, entry.dtype) for key, shape in shapes.items())
            written.append(_Written(entry, planned, split))
    _refuse_misread(model, config, written)
    return config, written


def _give_up(writer: WeightsWriter) -> None:
    if world().is_main:
        writer.abandon()
        shutil.rmtree(writer.folder, ignore_errors=True)


def _report(
    folder: Path, model: nn.Module, dtype: torch.dtype, plan: Sequence[Planned], files: int, drift: Drift
) -> MergeReport:
    return MergeReport(
        folder=str(folder),
        method=attached(model).info.name,
        base=drift.base,
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(plan),
        files=files,
        bytes=sum(tensor.bytes for tensor in plan),
        drift=drift.by_layer(),
        total_drift=drift.overall(),
        unknown=len(drift.unknown),
    )


def _dtype(dtype: str | torch.dtype | None, model: nn.Module) -> torch.dtype:
    if dtype is None:
        computed: torch.dtype = model.dtype  # type: ignore[assignment]
        return computed if computed in DTYPES.values() else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def _write(writer: WeightsWriter, entry: _Written, written: Callable[[], None] | None) -> None:
    """Collective: what the entry needs is gathered to rank 0, which makes and writes it, and then calls `written`."""
    first = entry.planned[0].key

    def write() -> None:
        made = entry.entry.make()
        tensors = {first: made} if entry.split is None else entry.split(made)
        del made
        try:
            for key in [planned.key for planned in entry.planned]:
                writer.write(key, tensors.pop(key))
        except OSError as error:
            raise storage_error(writer.folder, error) from error
        if written is not None:
            written()

    whole_on_main(entry.entry.needs, f"writing {first}", write)


def _plain_config(
    model: nn.Module, entries: Sequence[Entry], dtype: torch.dtype
) -> tuple[Any, list[Entry], dict[str, str]]:
    """The configuration of the plain model, entries of zeros for biases that come with those that the method added, and what a
    reader with this configuration ties where it finds one of two.

    Raises:
        UsageError: the architecture has no place for a bias that the method added.
    """
    config: Any = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    held = {entry.name: entry.identity for entry in entries}
    ties = expected_ties(model, config)
    if ties and all(held.get(target) != held.get(source) for target, source in ties.items()):
        say_untied(model, config)  # nothing is tied any more
    added = [entry.name for entry in entries if entry.added]
    if not added:
        return config, [], ties
    for switch in BIAS_SWITCHES:
        if getattr(config, switch, None) is False:
            setattr(config, switch, True)
    expected = expected_parameters(model, config)
    homeless = [name for name in added if name not in expected]
    if homeless:
        raise UsageError(
            f"method {attached(model).info.name} added a bias to {homeless[0].removesuffix('.bias')}, where "
            f"{type(model).__name__} has no place for one; accepted for it: save_adapter, and load_adapter on the base"
        )
    zeros = [_zeros(n, p, dtype) for n, p in expected.items() if n.endswith(".bias") and n not in held]
    return config, zeros, ties


def _refuse_misread(model: nn.Module, config: Any, written: Sequence[_Written]) -> None:
    """Raises UsageError where transformers would make something else of a key."""
    keys = {each.entry.name: [planned.key for planned in each.planned] for each in written}
    wrong = misread(model, config, keys, [each.entry.name for each in written if each.split is not None])
    if wrong:
        raise UsageError(
            f"{type(model).__name__} cannot be merged: transformers would not read {wrong[0]} back as it is written "
            f"({keys[wrong[0]][0]}); accepted for it: save_adapter, and load_adapter on the base"
        )


def _zeros(name: str, like: nn.Parameter, dtype: torch.dtype) -> Entry:
    return Entry(name, tuple(like.shape), dtype, (), lambda: torch.zeros(like.shape), (name,))


def _finish(writer: WeightsWriter, hidden: Path, target: Path, config: Any, model: nn.Module, tokenizer: Any) -> None:
    """Everything beside the weights; then the folder gets its name."""
    try:
        writer.finish()
        config.save_pretrained(hidden)
        if getattr(model, "generation_config", None) is not None:
            _save_generation_config(model, hidden)
        source = source_folder(model) or Path("no such folder")
        names = [file.name for file in source.glob("*.py")] if getattr(config, "auto_map", None) else []
        copy_files(source, names, hidden)
        if tokenizer is None and has_tokenizer(source) and attached(model).config.new_tokens:
            say(
                "the merged model is written without a tokenizer: its base's does not know the adapter's new tokens; accepted: "
                "the tokenizer of the training (merge's argument `tokenizer`)"
            )
        else:
            write_tokenizer(source if tokenizer is None else tokenizer, hidden)
        card = merged_card(adapter_config(model), type(model).__name__)
        (hidden / "README.md").write_text(card, encoding="utf-8")
        publish_folder(hidden, target)
    except (OSError, SafetensorError) as error:
        raise storage_error(target, error) from error


def _save_generation_config(model: nn.Module, folder: Path) -> None:
    """transformers refuses to write a generation configuration that it would load with a warning: the model is whole
    without it."""
    with suppress(ValueError):
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]
