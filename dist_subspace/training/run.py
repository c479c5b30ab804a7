"""One run from its configuration to its exit status: what `dist-subspace train` and `launch/train.py` do."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import StorageError, whole_folder, write_json_atomic, write_text_atomic
from dist_subspace.checkpoint.set_aside import move_aside, set_aside_others
from dist_subspace.checkpoint.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, State
from dist_subspace.config import dump_config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import CONFIG, complete_adapter
from dist_subspace.interchange.model_card import model_card
from dist_subspace.placement.collectives import PeerFailed, agreed, barrier, on_main, tell_peers, wait_until_told, world
from dist_subspace.placement.zero import ensure_process_group
from dist_subspace.report.curve import loss_curve
from dist_subspace.report.history import read_lines
from dist_subspace.training.changes import changed_settings
from dist_subspace.training.display import Display
from dist_subspace.training.engine import be_quiet
from dist_subspace.training.engine_config import with_stock_choices
from dist_subspace.training.memory import advice, is_out_of_memory
from dist_subspace.training.metrics import MetricsWriter
from dist_subspace.training.observer import Observer
from dist_subspace.training.outcome import divergence, failure, losses_by_step, skipped_text
from dist_subspace.training.plan import Plan, make_plan, steps_text
from dist_subspace.training.run_status import RunStatus
from dist_subspace.training.schedule import schedule_of, warmup_warning
from dist_subspace.training.trackers import Trackers
from dist_subspace.training.trainer import Progress, Trainer, final_checkpoint

_PATIENCE = 30.0  # seconds that a rank stays for another one, which failed, to say why


def train(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration; returns the exit status: 0 finished, 2 refused, 75 interrupted, 1 failed.

    Rank 0 alone prints, and keeps RUN/status.json; where one rank failed, that rank does. A second run in the same folder is
    refused, and changes nothing there.
    """
    status: RunStatus | None = None
    plan: Plan | None = None
    be_quiet()
    try:
        ensure_process_group()  # first, so that a refusal is everyone's and is said once
        with agreed("reading the configuration"):
            config = with_stock_choices(load_config(source, overrides))
        status = RunStatus(config.run.output_dir)
        status.take()
        with Display(enabled=world().is_main, total_steps=0) as display:
            display.show_config(dump_config(config))
            plan = make_plan(config, display.notice)
        return _run(plan, status)
    except UsageError as error:
        return _end(status, "refused", str(error), EXIT_USAGE)
    except StorageError as error:
        return _end(status, "failed", str(error), EXIT_FAILED, everywhere=True)
    except PeerFailed:
        wait_until_told(_PATIENCE)  # the status is for the rank at fault to write
        return EXIT_FAILED
    except Exception as error:
        if plan is not None and is_out_of_memory(error):
            return _end(status, "failed", _memory_advice(plan), EXIT_FAILED, everywhere=True)
        traceback.print_exc()
        return _end(status, "failed", f"{type(error).__name__}: {error}", EXIT_FAILED, everywhere=True)
    finally:
        if status is not None:
            status.release()


def _run(plan: Plan, status: RunStatus) -> int:
    step = plan.checkpoint[1].step if plan.checkpoint else 0
    status.write("running", step=step)
    observer = Observer(Display(enabled=world().is_main, total_steps=plan.total_steps), None, None, plan.device)
    try:
        _say_first(plan, observer)
        trainer = Trainer(plan, observer)
        try:
            with agreed("opening the run directory"):
                if world().is_main:
                    _open(plan, observer, step)
                    observer.reached = status.reached
            finished = trainer.run()
            progress = trainer.progress
            failed = failure(progress.not_applied, progress.step, trainer.last_loss()) if finished else None
        finally:
            trainer.stop.close()
    finally:
        observer.close()
    if not finished:
        again = "" if plan.config.checkpoint.resume == "auto" else " with checkpoint.resume=auto"
        message = (
            f"interrupted by {trainer.stop.reason} after step {progress.step}; run the same command{again} to continue"
        )
        return _end(status, "interrupted", message, EXIT_INTERRUPTED, progress.step)
    if failed is not None:
        on_main(_hide_adapter, plan, progress)
        return _end(status, "failed", failed, EXIT_FAILED, progress.step)
    warning = on_main(_doubts, plan, trainer)
    on_main(_write_results, plan, progress, observer, warning)
    status.write("finished", step=progress.step, warning=warning, skipped=progress.not_applied)
    return EXIT_OK


def _say_first(plan: Plan, observer: Observer) -> None:
    observer.notice(steps_text(plan))
    if plan.data.left_out:
        observer.notice(f"{plan.data.left_out:,} samples left out: their answer alone is longer than data.max_length")
    if plan.resolved.unused:
        observer.notice(f"method {plan.resolved.info.name} has no {' or '.join(plan.resolved.unused)}: not used")
    if plan.resolved.notice:
        observer.notice(plan.resolved.notice)
    training, done = plan.config.training, plan.checkpoint[1].step if plan.checkpoint else 0
    rates = schedule_of(training, plan.total_steps)
    if (warning := warmup_warning(rates, training.warmup_steps, done, plan.total_steps)) is not None:
        observer.warning(warning)
    if plan.checkpoint is not None and world().is_main:
        for sentence in changed_settings(plan.config, *plan.checkpoint):
            observer.notice(sentence)


def _open(plan: Plan, observer: Observer, step: int) -> None:
    """Local, rank 0: begin to write in RUN. The model is loaded and restored by now: what fails before has moved nothing."""
    resumed = plan.checkpoint[0] if plan.checkpoint else None
    anew = plan.config.checkpoint.resume == "none"
    set_aside_others(plan.run_dir, step, resumed, anew, observer.display.warning)
    write_text_atomic(plan.run_dir / "config.yaml", dump_config(plan.config))
    observer.metrics = MetricsWriter(plan.run_dir, resume_step=step)
    observer.trackers = Trackers(
        plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning, step
    )


def _hide_adapter(plan: Plan, progress: Progress) -> None:
    """Local, rank 0: what an earlier end of the run has left must not pass for this one's."""
    adapter = plan.run_dir / "adapter"
    if adapter.is_dir():
        folder = move_aside(plan.run_dir, progress.step, [adapter])
        print(f"the adapter of an earlier end of the run was set aside in {folder}", file=sys.stderr, flush=True)


def _doubts(plan: Plan, trainer: Trainer) -> str | None:
    """Local, rank 0: what whoever takes the adapter should know; None for nothing."""
    own, step = trainer.losses, trainer.progress.step
    losses = losses_by_step(read_lines(plan.run_dir), own, step - len(own))
    said = [skipped_text(trainer.progress.not_applied, step), divergence(losses)]
    return "; ".join(filter(None, said)) or None


def _write_results(plan: Plan, progress: Progress, observer: Observer, warning: str | None) -> None:
    """Local, rank 0: RUN/adapter, complete in itself, and the picture."""
    source, folder = final_checkpoint(plan, progress), plan.run_dir / "adapter"
    with whole_folder(folder, replace=True) as hidden:  # an earlier end of the run may have left one
        complete_adapter(source, hidden)
        plan.tokenizer.save_pretrained(hidden)
        described = _read_json(hidden / CONFIG)
        write_text_atomic(hidden / "README.md", model_card(described, _facts(plan, progress)))
        if plan.data.labels is not None:
            write_json_atomic(hidden / "labels.json", plan.data.labels)
    curve = None
    with suppress(UsageError):  # a checkpoint of another run, and no step left to make: there is nothing to draw
        curve = loss_curve(plan.run_dir)
    if warning is not None:
        observer.display.warning(warning)
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
    status: RunStatus | None, state: State, message: str, code: int, step: int | None = None, everywhere: bool = False
) -> int:
    """Say how it ended: one sentence from rank 0, or from the rank where it happened."""
    rank = world().rank
    if rank == 0 or everywhere:
        print(message if state == "interrupted" else f"error: {message}", file=sys.stderr, flush=True)
    if status is not None:
        status.write(state, message, step, rank, anyone=everywhere)
    if everywhere:
        tell_peers()
    if state == "refused":
        barrier()  # a launcher ends all ranks with the first one that leaves: rank 0 must have spoken by then
    return code


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


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text())
