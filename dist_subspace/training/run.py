"""One run from its configuration to its exit status: what `dist-subspace train` and `launch/train.py` do."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import StorageError, whole_folder, write_json_atomic, write_text_atomic
from dist_subspace.checkpoint.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, State, write_status
from dist_subspace.checkpoint.store import remove_after
from dist_subspace.config import Config, dump_config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import complete_adapter
from dist_subspace.interchange.description import read_description
from dist_subspace.interchange.model_card import model_card
from dist_subspace.placement.collectives import PeerFailed, agreed, barrier, on_main, tell_peers, wait_until_told, world
from dist_subspace.placement.zero import ensure_process_group
from dist_subspace.report.curve import loss_curve
from dist_subspace.training.display import Display
from dist_subspace.training.engine import be_quiet
from dist_subspace.training.engine_config import with_stock_choices
from dist_subspace.training.memory import advice, is_out_of_memory
from dist_subspace.training.metrics import MetricsWriter
from dist_subspace.training.observer import Observer
from dist_subspace.training.plan import Plan, make_plan, steps_text
from dist_subspace.training.trackers import Trackers
from dist_subspace.training.trainer import Progress, Trainer, final_checkpoint

_PATIENCE = 30.0  # seconds that a rank stays for another one, which failed, to say why


def train(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration; returns the exit status: 0 finished, 2 refused, 75 interrupted, 1 failed.

    Rank 0 alone prints, and keeps RUN/status.json; where one rank failed, that rank does.
    """
    config: Config | None = None
    plan: Plan | None = None
    be_quiet()
    try:
        ensure_process_group()  # first, so that a refusal is everyone's and is said once
        with agreed("reading the configuration"):
            config = with_stock_choices(load_config(source, overrides))
        with Display(enabled=world().is_main, total_steps=0) as display:
            display.show_config(dump_config(config))
            plan = make_plan(config, display.notice)
        return _run(plan)
    except UsageError as error:
        return _end(config, "refused", str(error), EXIT_USAGE)
    except StorageError as error:
        return _end(config, "failed", str(error), EXIT_FAILED, everywhere=True)
    except PeerFailed:
        wait_until_told(_PATIENCE)  # the status is for the rank at fault to write
        return EXIT_FAILED
    except Exception as error:
        if plan is not None and is_out_of_memory(error):
            return _end(config, "failed", _memory_advice(plan), EXIT_FAILED, everywhere=True)
        traceback.print_exc()
        return _end(config, "failed", f"{type(error).__name__}: {error}", EXIT_FAILED, everywhere=True)


def _run(plan: Plan) -> int:
    _status(plan.config, "running", "", plan.checkpoint[1].step if plan.checkpoint else 0)
    observer = _observer(plan)
    try:
        observer.notice(steps_text(plan))
        if plan.data.left_out:
            observer.notice(
                f"{plan.data.left_out:,} samples left out: their answer alone is longer than data.max_length"
            )
        if plan.resolved.unused:
            observer.notice(f"method {plan.resolved.info.name} has no {' or '.join(plan.resolved.unused)}: not used")
        if plan.resolved.notice:
            observer.notice(plan.resolved.notice)
        trainer = Trainer(plan, observer)
        try:
            finished = trainer.run()
        finally:
            trainer.stop.close()
    finally:
        observer.close()
    if not finished:
        message = (
            f"interrupted by {trainer.stop.reason} after step {trainer.progress.step}; run the same command to continue"
        )
        return _end(plan.config, "interrupted", message, EXIT_INTERRUPTED, trainer.progress.step)
    on_main(_write_results, plan, trainer.progress, observer)
    _status(plan.config, "finished", "", trainer.progress.step)
    return EXIT_OK


def _observer(plan: Plan) -> Observer:
    main = world().is_main
    display = Display(enabled=main, total_steps=plan.total_steps)
    step = plan.checkpoint[1].step if plan.checkpoint else 0
    metrics = trackers = None
    with agreed("opening the run directory"):
        if main:
            remove_after(plan.run_dir, step)  # of a history that this run does not continue
            write_text_atomic(plan.run_dir / "config.yaml", dump_config(plan.config))
            metrics = MetricsWriter(plan.run_dir, resume_step=step)
            trackers = Trackers(
                plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), display.warning, step
            )
    return Observer(display, metrics, trackers, plan.device)


def _write_results(plan: Plan, progress: Progress, observer: Observer) -> None:
    """Local, rank 0: RUN/adapter, complete in itself, and the picture."""
    source, folder = final_checkpoint(plan, progress), plan.run_dir / "adapter"
    with whole_folder(folder, replace=True) as hidden:  # an earlier end of the run may have left one
        complete_adapter(source, hidden)
        plan.tokenizer.save_pretrained(hidden)
        write_text_atomic(hidden / "README.md", model_card(read_description(hidden), _facts(plan, progress)))
        if plan.data.labels is not None:
            write_json_atomic(hidden / "labels.json", plan.data.labels)
    curve = None
    with suppress(UsageError):  # a checkpoint of another run, and no step left to make: there is nothing to draw
        curve = loss_curve(plan.run_dir)
    observer.display.finish(f"finished after step {progress.step:,}", adapter=folder, curve=curve)


def _facts(plan: Plan, progress: Progress) -> dict[str, Any]:
    config = plan.config
    return {
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "global batch size": config.training.global_batch_size,
        "learning rate": config.training.learning_rate,
        "schedule": config.training.lr_scheduler_type,
        "storage of the frozen weights": config.model.storage,
        "DeepSpeed": config.deepspeed.config or config.deepspeed.preset,
        "ranks": world().size,
        "seed": config.training.seed,
    }


def _end(
    config: Config | None, state: State, message: str, code: int, step: int | None = None, everywhere: bool = False
) -> int:
    """Say how it ended: one sentence from rank 0, or from the rank where it happened."""
    rank = world().rank
    if rank == 0 or everywhere:
        print(message if state == "interrupted" else f"error: {message}", file=sys.stderr, flush=True)
    if config is not None:
        _status(config, state, message, step, rank, anyone=everywhere)
    if everywhere:
        tell_peers()
    if state == "refused":
        barrier()  # a launcher ends all ranks with the first one that leaves: rank 0 must have spoken by then
    return code


def _status(
    config: Config, state: State, message: str, step: int | None, rank: int | None = None, anyone: bool = False
) -> None:
    """RUN/status.json; a refusal because the folder cannot be written has nowhere to say so but the screen."""
    if not (world().is_main or anyone):
        return
    try:
        write_status(config.run.output_dir, state, message, step, rank)
    except OSError:
        return


def _memory_advice(plan: Plan) -> str:
    from transformers import AutoConfig

    training, model = plan.config.training, AutoConfig.from_pretrained(str(plan.model_folder)).get_text_config()
    return advice(
        training.per_device_train_batch_size,
        plan.config.data.max_length,
        int(model.vocab_size),
        int(model.hidden_size),
        int(model.num_hidden_layers),
        training.gradient_checkpointing,
    )
