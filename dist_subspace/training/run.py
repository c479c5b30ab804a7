"""One run from its configuration to its exit status: what `dist-subspace train` and `launch/train.py` do."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import StorageError, write_text_atomic
from dist_subspace.checkpoint.set_aside import set_aside_others
from dist_subspace.config import Config, dump_config, load_config, settings_of_all
from dist_subspace.config.brief import brief_lines
from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import text_config
from dist_subspace.launchers import is_first
from dist_subspace.placement.collectives import (
    PeerFailed,
    PeerGone,
    agreed,
    is_everyones,
    known_peers,
    on_main,
    refuse_unlike,
    world,
)
from dist_subspace.placement.engines import be_quiet
from dist_subspace.placement.heartbeat import Heartbeat
from dist_subspace.placement.peers import join
from dist_subspace.placement.process_group import allow_collectives, meet_ranks
from dist_subspace.placement.rendezvous import RefusedElsewhere
from dist_subspace.run_folder.local import local_folder
from dist_subspace.run_folder.metrics import MetricsWriter
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from dist_subspace.stopping import STOP, Interrupted, listening
from dist_subspace.training.announce import announced
from dist_subspace.training.changes import changed_settings, earlier_tokens
from dist_subspace.training.data.cutting_text import cutting_text
from dist_subspace.training.display import Display
from dist_subspace.training.dry_run import show_dry_run
from dist_subspace.training.engine_config import with_stock_choices
from dist_subspace.training.environment import gather_environment, write_environment
from dist_subspace.training.last_words import (
    Run,
    end,
    end_after_another,
    end_waiting,
    end_without,
    hear,
    interrupted_text,
    left_at_once,
    peers_at_fault,
)
from dist_subspace.training.lost_ranks import end_without_gone, end_without_lost
from dist_subspace.training.memory import advice, is_out_of_memory
from dist_subspace.training.observer import Observer
from dist_subspace.training.outcome import failure
from dist_subspace.training.plan import Plan, make_plan, steps_text
from dist_subspace.training.profile import Profile
from dist_subspace.training.rank_logs import RankLog, heading, last_lines
from dist_subspace.training.results import doubts, hide_adapter, send_curve, write_results
from dist_subspace.training.run_status import RunStatus
from dist_subspace.training.schedule import schedule_of, warmup_warning
from dist_subspace.training.trackers import Trackers
from dist_subspace.training.trainer import NotFinite, Trainer
from dist_subspace.training.whereabouts import whereabouts


def train(
    source: str | Path | dict[str, Any], overrides: Sequence[str] = (), logs: bool = False, dry: bool = False
) -> int:
    """Run a configuration; returns the exit status: 0 finished, 2 refused, 75 interrupted, 1 failed.

    Rank 0 alone prints, and keeps RUN/status.json; where one rank failed, that rank does. A second run in the same folder is
    refused, and changes nothing there.

    Arguments:
        logs: whether all that is said on another rank than 0 goes into its own log from when the configuration is read, for a
            process that does nothing else: its descriptors 1 and 2 are moved.
        dry: do everything up to the first step, show what would be trained, and leave the run's folder as it is, but for the
            tokens and factors that the run itself will find there.
    """
    run = Run(has_logs=logs, dry=dry)
    return watched(run, lambda: _train(run, source, overrides))


def watched(run: Run, body: Callable[[], int], say: Callable[[str], None] | None = None) -> int:
    """Collective: run the body, which returns the exit status, on ranks that meet first and watch each other while it lasts.

    Arguments:
        say: told what takes long before; unset: the screen of a run.
    """
    be_quiet()
    with listening() as stop:
        stop.leave = lambda reason: left_at_once(run, reason)
        try:
            with stop.leavable(), stop.interruptible(), announced("meeting the other ranks", _first_says(say)):
                meet_ranks()  # first, so that a refusal is everyone's and is said once
        except Interrupted as told:
            return left_at_once(run, str(told))
        except RefusedElsewhere:
            return EXIT_USAGE
        run.peers = join(stop)
        run.heartbeat = Heartbeat(run.peers, lambda loss: end_without_lost(run, loss)) if run.peers else None
        with run.heartbeat.beating(stop) if run.heartbeat else nullcontext(), known_peers(run.peers):
            try:
                status = body()
            finally:
                if run.status is not None:
                    run.status.release()
        if world().is_main:
            _push(run)  # for whom no rank waits
        return status


def _train(run: Run, source: str | Path | dict[str, Any], overrides: Sequence[str]) -> int:
    try:
        with STOP.leavable(), agreed("reading the configuration"):
            config = with_stock_choices(load_config(source, overrides))
        refuse_unlike(settings_of_all(config))
        run.config, run.status = config, RunStatus(config.run.output_dir, in_passing=run.dry)
        _watch_ranks(run, config)
        run.status.take()  # not left in its middle: whoever leaves must know whose folder it is
        with STOP.leavable():
            with Display(enabled=world().is_main, total_steps=0) as display:
                for sentence in whereabouts(config):
                    display.notice(sentence)
                run.plan = make_plan(config, display.notice)
                display.show_config(brief_lines(run.plan.config), run.plan.run_dir.config)
        return _run(run, run.plan, run.status)
    except (Exception, Interrupted) as error:
        return ended(run, error)


def ended(run: Run, fault: Exception | Interrupted) -> int:
    """What ended the run before its time, said once; the exit status."""
    try:
        raise fault
    except UsageError as error:
        return end(run, "refused", str(error), EXIT_USAGE, everywhere=not is_everyones(error))
    except StorageError as error:
        return end(run, "failed", str(error), EXIT_FAILED, everywhere=True)
    except Interrupted as told:
        return end(run, "interrupted", interrupted_text(run, str(told)), EXIT_INTERRUPTED, run.saved)
    except PeerGone as error:
        return end_without_gone(run, error.gone)
    except PeerFailed:
        return end_after_another(run)
    except NotFinite as error:
        return end(run, "failed", str(error), EXIT_FAILED, run.step)
    except Exception as error:
        if run.plan is not None and is_out_of_memory(error):
            return end(run, "failed", _memory_advice(run.plan), EXIT_FAILED, everywhere=True)
        gone = peers_at_fault(run, error)
        if gone is not None:
            return end_without(run, gone)
        if (code := end_waiting(run, error)) is not None:
            return code
        run.traceback = traceback.format_exc()
        print(run.traceback, file=sys.stderr, flush=True)
        return end(run, "failed", f"{type(error).__name__}: {error}", EXIT_FAILED, everywhere=True)


def _watch_ranks(run: Run, config: Config) -> None:
    """Collective: from now on the configuration says how long a rank may be silent, and each rank but rank 0 has its own log."""
    if run.peers is None or run.heartbeat is None:
        return
    run.heartbeat.allow(config.training.rank_timeout)
    allow_collectives(config.training.rank_timeout)
    folder = local_folder(config.run.local_dir, config.run.output_dir)
    run.peers.log_of = lambda rank: last_lines(folder.log(rank))
    if run.has_logs:
        with agreed("opening this rank's log"):
            run.open_log = partial(RankLog, folder, world().rank, heading(config.run.output_dir))
            if not world().is_main:
                run.log = run.open_log((1, 2))
    if world().is_main:
        run.peers.hear = lambda: hear(run)


def _run(run: Run, plan: Plan, status: RunStatus) -> int:
    step = plan.checkpoint[1].step if plan.checkpoint else 0
    status.write("running", step=step)
    section = plan.config.run
    between = {
        "evaluation": section.eval_steps,
        "samples": section.eval_steps,
        "checkpoint": plan.config.checkpoint.save_steps,
    }
    display = Display(enabled=world().is_main, total_steps=plan.total_steps, every=between)
    observer = Observer(display, None, None, plan.device)
    run.display = observer.display
    try:
        _say_first(plan, observer)
        with STOP.leavable():
            trainer = Trainer(plan, observer)
        if run.dry:
            on_main(show_dry_run, plan, display)
            return EXIT_OK
        run.trainer = trainer
        allow_collectives(plan.config.training.rank_timeout)  # also those of the groups that the engine has made
        environment = gather_environment(step)
        with agreed("opening the run directory"):
            if world().is_main:
                _open(plan, observer, step)
                write_environment(plan.run_dir, environment)
                observer.reached = status.reached
        finished = trainer.run()
        progress = trainer.progress
        failed = failure(progress.not_applied, progress.step, trainer.last_loss()) if finished else None
        if finished and world().is_main:
            send_curve(plan, progress.step, observer)
    finally:
        observer.close()
    if not finished:
        raise Interrupted(STOP.reason)
    if failed is not None:
        on_main(hide_adapter, plan, progress)
        return end(run, "failed", failed, EXIT_FAILED, progress.step)
    warning = on_main(doubts, plan, trainer)
    on_main(write_results, plan, progress, observer, warning)
    status.write("finished", step=progress.step, warning=warning, skipped=progress.not_applied)
    run.result = plan.run_dir.adapter
    return EXIT_OK


def _push(run: Run) -> None:
    """Local, rank 0: the final adapter to the Hub, where the configuration says so."""
    if run.result is None or run.config is None or run.config.run.push_to_hub is None:
        return
    from dist_subspace.publishing.at_the_end import push_at_the_end, result_repository

    repository = result_repository(run.config.run.push_to_hub, run.config.run.hub_private_repo)
    push_at_the_end(run.result, repository, lambda text: print(text, flush=True))


def _say_first(plan: Plan, observer: Observer) -> None:
    observer.notice(steps_text(plan))
    sentences, many = cutting_text(plan.data.cutting, plan.config.data.max_length)
    for sentence in sentences:
        observer.display.notice(sentence, warning=many)
    for sentence in plan.data.notices:
        observer.notice(sentence)
    if plan.resolved.unused:
        observer.notice(f"method {plan.resolved.info.name} has no {' or '.join(plan.resolved.unused)}: not used")
    if plan.resolved.notice:
        observer.notice(plan.resolved.notice)
    if plan.rate is not None and plan.rate.said is not None:
        observer.notice(plan.rate.said)
    if plan.rate is not None and plan.rate.warning is not None:
        observer.warning(plan.rate.warning)
    training, done = plan.config.training, plan.checkpoint[1].step if plan.checkpoint else 0
    rates = schedule_of(training, plan.total_steps)
    if (warning := warmup_warning(rates, training.warmup_steps, done, plan.total_steps)) is not None:
        observer.warning(warning)
    if plan.checkpoint is not None and world().is_main:
        changed = changed_settings(plan.config, *plan.checkpoint)
        older = earlier_tokens(plan.config, plan.data.cutting, *plan.checkpoint)
        for sentence in (*changed, *([older] if older else [])):
            observer.notice(sentence)


def _open(plan: Plan, observer: Observer, step: int) -> None:
    """Local, rank 0: begin to write in RUN. The model is loaded and restored by now: what fails before has moved nothing."""
    resumed = plan.checkpoint[0] if plan.checkpoint else None
    anew = plan.config.checkpoint.resume == "none"
    set_aside_others(plan.run_dir, step, resumed, anew, observer.display.warning)
    write_text_atomic(plan.run_dir.config, dump_config(plan.config))
    if plan.config.run.profile is not None:
        observer.profile = Profile(plan.config.run.profile, plan.run_dir.profile, plan.device, observer.notice)
    observer.run_dir = plan.run_dir
    observer.metrics = MetricsWriter(plan.run_dir, resume_step=step)
    observer.trackers = Trackers(
        plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning, step
    )


def _first_says(say: Callable[[str], None] | None) -> Callable[[str], None]:
    """Local: of ranks that have not met yet, the launcher's first one alone speaks."""
    if not is_first():
        return lambda text: None
    return say or partial(print, flush=True)


def _memory_advice(plan: Plan) -> str:
    from transformers import AutoConfig

    training, model = plan.config.training, text_config(AutoConfig.from_pretrained(str(plan.model_folder)))
    return advice(
        training.per_device_train_batch_size,
        plan.config.data.max_length,
        int(model.vocab_size),
        int(model.hidden_size),
        int(model.num_hidden_layers),
        training.gradient_checkpointing,
        training.activation_offload or plan.device.type == "cpu",
    )
