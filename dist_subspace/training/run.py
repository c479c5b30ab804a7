"""One run from its configuration to its exit status: what `dist-subspace train` and `launch/train.py` do."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_subspace.atomic_files import StorageError, whole_folder, write_json_atomic, write_text_atomic
from dist_subspace.checkpoint.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, State, write_status
from dist_subspace.checkpoint.store import remove_after
from dist_subspace.config import Config, dump_config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import CONFIG, complete_adapter
from dist_subspace.interchange.model_card import model_card
from dist_subspace.placement.collectives import (
    PeerFailed,
    PeerGone,
    agreed,
    known_peers,
    meet,
    on_main,
    tell_peers,
    wait_until_told,
    world,
)
from dist_subspace.placement.peers import Peer, Peers, join
from dist_subspace.placement.zero import ensure_process_group
from dist_subspace.report.curve import loss_curve
from dist_subspace.stopping import STOP, Interrupted, listening
from dist_subspace.training.announce import announced
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
_FEW = 5.0  # seconds in which a rank that was killed shows as ended, after its neighbour's connection broke


@dataclass
class _Run:
    """What is known of a run so far, for its last words."""

    config: Config | None = None
    plan: Plan | None = None
    trainer: Trainer | None = None
    peers: Peers | None = None

    @property
    def saved(self) -> int:
        """The step that the same command goes on after; 0: it begins anew."""
        if self.trainer is not None and self.trainer.saved is not None:
            return self.trainer.saved[0]
        return self.plan.checkpoint[1].step if self.plan is not None and self.plan.checkpoint else 0

    @property
    def step(self) -> int | None:
        """The last whole step."""
        if self.trainer is not None and self.trainer.progress.step:
            return self.trainer.progress.step
        return None if self.plan is None else self.saved


def train(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration; returns the exit status: 0 finished, 2 refused, 75 interrupted, 1 failed.

    Rank 0 alone prints, and keeps RUN/status.json; where one rank failed, that rank does.
    """
    run = _Run()
    be_quiet()
    with listening() as stop:
        stop.leave = lambda reason: _left_at_once(run, reason)
        try:
            with stop.leavable(), stop.interruptible(), announced("meeting the other ranks", _say_early):
                ensure_process_group()  # first, so that a refusal is everyone's and is said once
        except Interrupted as told:
            return _left_at_once(run, str(told))
        run.peers = join(stop)
        with stop.watching(run.peers.look) if run.peers else nullcontext(), known_peers(run.peers):
            return _train(run, source, overrides)


def _train(run: _Run, source: str | Path | dict[str, Any], overrides: Sequence[str]) -> int:
    try:
        with STOP.leavable():
            with agreed("reading the configuration"):
                run.config = with_stock_choices(load_config(source, overrides))
            with Display(enabled=world().is_main, total_steps=0) as display:
                display.show_config(dump_config(run.config))
                run.plan = make_plan(run.config, display.notice)
        return _run(run, run.plan)
    except UsageError as error:
        return _end(run.config, "refused", str(error), EXIT_USAGE)
    except StorageError as error:
        return _end(run.config, "failed", str(error), EXIT_FAILED, everywhere=True)
    except Interrupted as told:
        return _end(run.config, "interrupted", _until_when(run, str(told)), EXIT_INTERRUPTED, run.saved)
    except PeerGone as error:
        return _end_without(run, error.gone)
    except PeerFailed:
        wait_until_told(_PATIENCE)  # the status is for the rank at fault to write
        return EXIT_FAILED
    except Exception as error:
        if run.plan is not None and is_out_of_memory(error):
            return _end(run.config, "failed", _memory_advice(run.plan), EXIT_FAILED, everywhere=True)
        if run.peers is not None and _may_come_from_a_peer(error):
            gone = run.peers.gone_within(_FEW)
            if gone or wait_until_told(0.2):
                return _end_without(run, gone)
        traceback.print_exc()
        return _end(run.config, "failed", f"{type(error).__name__}: {error}", EXIT_FAILED, everywhere=True)


def _run(run: _Run, plan: Plan) -> int:
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
        with STOP.leavable():
            trainer = Trainer(plan, observer)
        run.trainer = trainer
        finished = trainer.run()
    finally:
        observer.close()
    if not finished:
        raise Interrupted(STOP.reason)
    on_main(_write_results, plan, trainer.progress, observer)
    _status(plan.config, "finished", "", trainer.progress.step)
    return EXIT_OK


def _until_when(run: _Run, reason: str) -> str:
    after = f"after step {run.saved}" if run.saved else "before the first step was saved"
    return f"interrupted by {reason} {after}; run the same command to continue"


def _left_at_once(run: _Run, reason: str) -> int:
    """Local: the last words of a process that does not wait for the others."""
    if world().is_main and _is_first():
        message = _until_when(run, reason)
        print(message, file=sys.stderr, flush=True)
        if run.config is not None:
            _status(run.config, "interrupted", message, run.saved)
    return EXIT_INTERRUPTED


def _is_first() -> bool:
    """Whether this is rank 0 by the launcher's environment, before there is a process group."""
    return os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0"


def _say_early(text: str) -> None:
    if _is_first():
        print(text, flush=True)


_OF_CONNECTIONS = ("gloo", "nccl", "connection", "broken pipe")


def _may_come_from_a_peer(error: Exception) -> bool:
    """Whether this is what a rank sees when another one ends: gloo raises a plain RuntimeError."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_CONNECTIONS)


def _end_without(run: _Run, gone: list[Peer]) -> int:
    """Another rank ended, without a word or with one: the first of those that are left speaks for it."""
    if not gone or wait_until_told(0.1):
        return EXIT_FAILED
    left = min(rank for rank in range(world().size) if rank not in {peer.rank for peer in gone})
    who, goes_on = ", ".join(map(str, gone)), f"from checkpoint-{run.saved}" if run.saved else "from the beginning"
    if run.peers is not None and STOP and all(map(run.peers.heard, gone)):
        state: State = "interrupted"
        message, status = f"interrupted by {STOP.reason}; {who} was ended before it had saved", EXIT_INTERRUPTED
    else:
        state, message, status = "failed", f"{who} was killed, or crashed", EXIT_FAILED
    message = f"{message}, after step {run.step or 0}; run the same command to continue {goes_on}"
    if world().rank == left:
        print(f"error: {message}" if state == "failed" else message, file=sys.stderr, flush=True)
        if run.config is not None:
            _status(run.config, state, message, run.step, gone[0].rank, anyone=True)
        tell_peers()
    else:
        wait_until_told(_FEW)
    return status


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
        described = _read_json(hidden / CONFIG)
        write_text_atomic(hidden / "README.md", model_card(described, _facts(plan, progress)))
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
    if state in ("refused", "interrupted"):
        with suppress(PeerFailed):
            meet()  # a launcher ends all ranks with the first one that leaves: rank 0 must have spoken by then
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


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text())
