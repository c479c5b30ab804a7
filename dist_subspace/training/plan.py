"""Everything about a run that can be decided, and refused, before a weight is loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_subspace.checkpoint.elsewhere import refuse_newer_elsewhere
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.checkpoint.state import check_same_run, find_checkpoint
from dist_subspace.checkpoint.store import check_writable, remove_leftovers
from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.loading.hub import TOKENIZER_FILES
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.load import check_revision, download, resolve_dtype, resolve_folder
from dist_subspace.loading.packed_head import head_options
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import agreed, on_main, refuse_unlike, world
from dist_subspace.placement.engines import check_engine, compute_device, ranks_per_near_group, stock_digest
from dist_subspace.placement.shared_folders import seen_by_ranks
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.trainer_state import TrainerState
from dist_subspace.storage import options_for
from dist_subspace.subspace import Resolved, SubspaceConfig, resolve, schedule_class_of
from dist_subspace.training.announce import SILENCE, announced
from dist_subspace.training.beginning import Beginning, find_beginning
from dist_subspace.training.best import check_measured
from dist_subspace.training.computation import dtype_begun_with, settled_dtype
from dist_subspace.training.data import Batches, Prepared
from dist_subspace.training.learning_rate import ChosenRate, choose_rate, with_rate
from dist_subspace.training.materials import read_materials
from dist_subspace.training.optimizers import check_optimizer
from dist_subspace.training.preferences.choice import check_objective
from dist_subspace.training.preferences.reference import needs_beginning
from dist_subspace.training.prepared_data import prepare_data
from dist_subspace.training.pulse import MINUTE
from dist_subspace.training.samples import check_prompts
from dist_subspace.training.schedule import schedule_of
from dist_subspace.training.sections import batch_settings, data_settings, subspace_config
from dist_subspace.training.trackers import check_installed
from dist_subspace.training.vocabulary import check_ids_used, usable_pad_id


@dataclass(frozen=True)
class Plan:
    """A run that nothing stands against: what to load, on what to train, for how long, and from where to continue."""

    config: Config
    run_dir: RunFolder
    model_folder: Path
    dtype: torch.dtype
    device: torch.device
    subspace: SubspaceConfig
    resolved: Resolved
    tokenizer: Any
    data: Prepared
    batches: Batches
    first_position: int
    """The position id of a sample's first token, as the model counts."""
    total_steps: int
    fingerprints: dict[str, str]
    checkpoint: tuple[Path, TrainerState] | None
    beginning: Beginning | None = None
    rate: ChosenRate | None = None
    """Where `config.training.learning_rate` comes from."""
    ranks_per_node: int | None = None
    """Where the preset splits weights inside nodes."""

    @property
    def pad_id(self) -> int:
        """What pads a row; the tokenizer's own padding may have no row in the model."""
        return self.batches.collate.pad_id

    @property
    def classes(self) -> int | None:
        return len(self.data.labels) if self.data.labels is not None else None


def make_plan(config: Config, notice: Callable[[str], None]) -> Plan:
    """Collective: check the whole configuration against the machine, the files and the stored run.

    Raises:
        UsageError: on every rank, with one sentence.
    """
    run_dir = RunFolder(config.run.output_dir)
    with agreed("checking the configuration"):
        device, _ = check_settings(config)
        stock = {"deepspeed.config": stock_digest(config.deepspeed.config)}
    refuse_unlike(stock)
    near = ranks_per_near_group(config.deepspeed.preset, config.deepspeed.config)
    begun_with = on_main(_open_run, config, run_dir, notice)
    config, dtype = settled_dtype(config, begun_with, device)
    run_is_seen = seen_by_ranks(run_dir)
    refuse_newer_elsewhere(run_dir, config.checkpoint.resume)
    beginning = on_main(_find_beginning, config, run_dir, notice)
    with announced("looking for the model's files", notice), heard(notice):
        download(config.model.path, revision=config.model.revision)
        if config.model.tokenizer is not None:
            download(config.model.tokenizer, "model.tokenizer", TOKENIZER_FILES)
    with announced("reading the tokenizer", notice), agreed("reading the tokenizer"):
        folder = resolve_folder(config.model.path, config.model.revision)
        open_checkpoint(folder)
        read = read_materials(folder, config, beginning, notice)
        config = read.config
    # A terminal has a bar for it.
    with announced("reading and tokenising the data", notice, MINUTE if sys.stderr.isatty() else SILENCE):
        data = prepare_data(config, read.tokenizer, run_is_seen)
    with agreed("planning the batches"):
        sources = [path for path, _ in data_settings(config.data).sources()]
        check_ids_used(data, read.tokenizer, read.rows, read.subspace.new_tokens, sources)
        pad_id = usable_pad_id(read.tokenizer, read.rows, read.subspace.new_tokens, notice)
        batches = Batches(data.train, batch_settings(config), pad_id, world().rank, world().size)
        config = with_batch_size(config, batches.global_batch_size)
        total_steps = _total_steps(config, batches)
        check_schedule(read.resolved, total_steps)
        schedule_of(config.training, total_steps, [1.0])
    with announced("comparing the model's files and looking for a checkpoint", notice):
        with agreed("comparing the model's files"):
            model = {"model fingerprint": base_fingerprint(folder)} if world().local_rank == 0 else {}
        refuse_unlike({"data fingerprint": data.fingerprint, **model})
        begun = beginning if needs_beginning(config) else None
        fingerprints = on_main(_fingerprints, folder, read.resolved, data, begun)
        checkpoint = on_main(_find_checkpoint, config, run_dir, fingerprints, notice)
        rate = on_main(choose_rate, config, read.resolved, folder, checkpoint)
    return Plan(
        config=with_rate(config, rate.rate),
        run_dir=run_dir,
        model_folder=folder,
        dtype=dtype,
        device=device,
        subspace=read.subspace,
        resolved=read.resolved,
        tokenizer=read.tokenizer,
        data=data,
        batches=batches,
        first_position=read.first_position,
        total_steps=total_steps,
        fingerprints=fingerprints,
        checkpoint=checkpoint,
        beginning=beginning,
        rate=rate,
        ranks_per_node=near,
    )


def check_settings(config: Config) -> tuple[torch.device, torch.dtype]:
    """Local: what needs neither the model's files nor the data; where this rank computes, and in which type.

    Raises:
        UsageError: with one sentence.
    """
    check_engine(config.deepspeed.preset, config.deepspeed.config)
    check_revision(config.model.path, config.model.revision)
    device = compute_device(config.deepspeed.preset, config.deepspeed.config)
    if config.subspace.init_from is None:  # else the adapter has the first word
        resolve(subspace_config(config))
    dtype = resolve_dtype(config.model.storage, config.model.dtype)
    options_for(config.model.storage, config.model.double_quant, config.model.storage_options)
    held = config.model
    head_options(held.head_storage, held.storage, held.double_quant, held.storage_options, dtype)
    check_optimizer(config.training.optim, device)
    check_installed(config.run.report_to)
    check_objective(config)
    check_measured(config)
    check_prompts(config)
    check_hardware(dtype, device)
    return device, dtype


def check_schedule(resolved: Resolved, total_steps: int) -> None:
    """The lengths of the method's schedule must fit into the run.

    Raises:
        UsageError: naming the options and their values.
    """
    kind = schedule_class_of(resolved.method)
    if kind is not None:
        kind({}, resolved.settings).check(total_steps)


def check_hardware(dtype: torch.dtype, device: torch.device) -> None:
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UsageError(
            f"model.dtype is bfloat16, which {torch.cuda.get_device_name(device)} does not have; accepted here: float16, float32"
        )


def with_batch_size(config: Config, size: int) -> Config:
    """The configuration with the number of rows that null stands for, which config.yaml then holds."""
    return config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": size})})


def _total_steps(config: Config, batches: Batches) -> int:
    if config.training.num_train_epochs is not None:
        return batches.total_steps(config.training.num_train_epochs)
    assert config.training.max_steps is not None  # the configuration has one of the two
    return config.training.max_steps


def _open_run(config: Config, run_dir: RunFolder, notice: Callable[[str], None]) -> str | None:
    """Local, rank 0: the type that the run has computed in so far; None where it begins."""
    check_writable(run_dir)
    if config.run.push_to_hub is not None:
        from dist_subspace.publishing.at_the_end import check_before, result_repository

        check_before(result_repository(config.run.push_to_hub, config.run.hub_private_repo), notice)
    for sentence in remove_leftovers(run_dir):
        notice(sentence)
    return dtype_begun_with(run_dir, config.checkpoint.resume)


def _fingerprints(folder: Path, resolved: Resolved, data: Prepared, reference: Beginning | None) -> dict[str, str]:
    """reference: the adapter that the trained one is compared with all along; None where there is none."""
    import hashlib
    import json

    decisive = [resolved.info.name, resolved.config.as_dict(), str(resolved.settings)]
    decisive += [] if reference is None else [reference.content()]
    method = json.dumps(decisive, sort_keys=True, default=str)
    return {
        "model": base_fingerprint(folder),
        "method": hashlib.sha256(method.encode()).hexdigest(),
        "data": data.fingerprint,
    }


def _find_beginning(config: Config, run_dir: RunFolder, notice: Callable[[str], None]) -> Beginning | None:
    """Local, rank 0: what `subspace.init_from` comes to, if it is given."""
    if config.subspace.init_from is None:
        return None
    newest = find_checkpoint(run_dir, config.checkpoint.resume, lambda sentence: None)  # which is said later
    resumed = None if newest is None or needs_beginning(config) else (newest[0], newest[1].begun)
    beginning = find_beginning(config.subspace.init_from, resumed, notice)
    return None if beginning is None else beginning.joined(config.subspace)


def _find_checkpoint(
    config: Config, run_dir: RunFolder, fingerprints: dict[str, str], notice: Callable[[str], None]
) -> tuple[Path, TrainerState] | None:
    checkpoint = find_checkpoint(run_dir, config.checkpoint.resume, notice)
    if checkpoint is not None:
        check_same_run(checkpoint[0], checkpoint[1].fingerprints, fingerprints, list(config.checkpoint.allow_different))
    return checkpoint


def steps_text(plan: Plan) -> str:
    """One sentence about the size of the run."""
    micro, batches = plan.batches.micro_per_step, plan.batches
    rounds = math.ceil(micro / world().size)
    return (
        f"{plan.total_steps:,} steps of {batches.global_batch_size} {'rows' if batches.packing else 'samples'} "
        f"({micro} micro-batches in {rounds} rounds on {world().size} ranks)"
    )
