"""`dist-subspace preview` and `prepare`: the data of a run as the model will see them, without a GPU and without a weight.

The tokens lie where the run looks for them, under the same key: it finds them made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dist_subspace.config import load_config
from dist_subspace.loading.hub import TOKENIZER_FILES
from dist_subspace.loading.load import download, resolve_folder
from dist_subspace.notices import heard
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.beginning import find_beginning
from dist_subspace.training.data import Batches, Prepared
from dist_subspace.training.data_report import data_rows, histogram
from dist_subspace.training.engine_config import with_stock_choices
from dist_subspace.training.materials import Materials, read_materials
from dist_subspace.training.prepared_data import prepare_data
from dist_subspace.training.rendering import show_samples
from dist_subspace.training.sections import batch_settings, data_settings
from dist_subspace.training.vocabulary import check_ids_used, usable_pad_id


@dataclass(frozen=True)
class Preparation:
    """The data of a run, tokenised, and where they lie."""

    materials: Materials
    data: Prepared
    folder: Path


def prepare_run(config: str, overrides: Sequence[str]) -> Preparation:
    """Local: tokenise the data of a configuration, or find them tokenised. Nothing of the model but its small files is read.

    Raises:
        UsageError: what the run itself would refuse about its data, tokenizer or lengths.
    """
    given = with_stock_choices(load_config(config, overrides))
    with heard(_say):
        download(given.model.path, "model.path", TOKENIZER_FILES, given.model.revision)
        if given.model.tokenizer is not None:
            download(given.model.tokenizer, "model.tokenizer", TOKENIZER_FILES)
        begun = given.subspace.init_from
        found = None if begun is None else find_beginning(begun, None, _say)
        folder = resolve_folder(given.model.path, given.model.revision, TOKENIZER_FILES)
        materials = read_materials(folder, given, None if found is None else found.joined(given.subspace), _say)
        settled = materials.config
        data = prepare_data(settled, materials.tokenizer, [True])
    sources = [path for path, _ in data_settings(settled.data).sources()]
    check_ids_used(data, materials.tokenizer, materials.rows, materials.subspace.new_tokens, sources)
    own = settled.data.cache_dir
    return Preparation(materials, data, RunFolder(settled.run.output_dir).tokens if own is None else Path(own))


def preview(config: str, overrides: Sequence[str], count: int) -> None:
    """Print the first `count` samples of the first epoch, and what the data come to."""
    made = prepare_run(config, overrides)
    settled, tokenizer, table = made.materials.config, made.materials.tokenizer, made.data.train
    settings = batch_settings(settled)
    pad = usable_pad_id(tokenizer, made.materials.rows, made.materials.subspace.new_tokens, _say)
    batches = Batches(table, settings, pad, 0, 1)
    console = Console(highlight=False)
    show_samples(console, tokenizer, table, batches.first_samples(count), made.data.labels, settled.data.format)
    lengths = (settled.data.max_length, settings.packing, settings.micro_batch_size)
    rows = data_rows(made.data, *lengths, settled.training.seed, settled.data.format)
    for name, text in rows:
        console.print(f"{name:<10}{text}", soft_wrap=True, markup=False)
    for line in histogram(made.data, settled.data.max_length):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"{'tokens':<10}kept in {made.folder}, where the run finds them", soft_wrap=True, markup=False)


def prepared_text(made: Preparation) -> str:
    """What `prepare` says."""
    table = made.data.train
    held_out = "" if made.data.eval is None else f" and {len(made.data.eval):,} held out"
    return f"{len(table):,} samples{held_out}, {int(table.lengths.sum()):,} tokens, in {made.folder}: the run finds them there"


def _say(sentence: str) -> None:
    print(f"notice: {sentence}", file=sys.stderr)
