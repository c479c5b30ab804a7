"""What a run that is through leaves in its folder: RUN/adapter and the picture, or neither. Local: rank 0 alone."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

from dist_subspace.atomic_files import StorageError, whole_folder, write_json_atomic, write_text_atomic
from dist_subspace.checkpoint.set_aside import move_aside
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import complete_adapter
from dist_subspace.interchange.description import read_description
from dist_subspace.interchange.model_card import model_card
from dist_subspace.run_folder.folder import adapter_labels
from dist_subspace.run_folder.metrics import read_lines, training_lines
from dist_subspace.training.best import chosen_text
from dist_subspace.training.card import edited_card, training_of
from dist_subspace.training.data.settings import PROMPTS
from dist_subspace.training.observer import Observer
from dist_subspace.training.outcome import divergence, losses_by_step, skipped_text
from dist_subspace.training.plan import Plan
from dist_subspace.training.progress import Progress
from dist_subspace.training.sections import data_settings
from dist_subspace.training.trainer import Trainer


def hide_adapter(plan: Plan, progress: Progress) -> None:
    """What an earlier end of the run has left must not pass for this one's."""
    adapter = plan.run_dir.adapter
    if adapter.is_dir():
        folder = move_aside(plan.run_dir, progress.step, [adapter])
        print(f"the adapter of an earlier end of the run was set aside in {folder}", file=sys.stderr, flush=True)


def doubts(plan: Plan, trainer: Trainer) -> str | None:
    """What whoever takes the adapter should know; None for nothing."""
    made_here, step = trainer.losses, trainer.progress.step
    losses = losses_by_step(training_lines(read_lines(plan.run_dir)), made_here, step - len(made_here))
    said = [skipped_text(trainer.progress.not_applied, step), divergence(losses)]
    return "; ".join(filter(None, said)) or None


def send_curve(plan: Plan, step: int, observer: Observer) -> None:
    """The picture, to the trackers that are open yet. A disk that refuses it will refuse the results too."""
    if observer.trackers is None or not observer.trackers.active:
        return
    with suppress(UsageError, StorageError):
        from dist_subspace.report.curve import loss_curve

        observer.trackers.picture("loss", loss_curve(plan.run_dir), step)


def write_results(plan: Plan, progress: Progress, observer: Observer, warning: str | None) -> None:
    """RUN/adapter, complete in itself, and the picture."""
    source, folder = final_checkpoint(plan, progress), plan.run_dir.adapter
    curve = None
    with suppress(UsageError):  # a checkpoint of another run, and no step left to make: there is nothing to draw
        from dist_subspace.report.curve import loss_curve  # matplotlib, which a start need not wait for

        curve = loss_curve(plan.run_dir)
    edited = edited_card(folder)
    with whole_folder(folder, replace=True) as hidden:  # an earlier end of the run may have left one
        complete_adapter(source, hidden, {PROMPTS: data_settings(plan.config.data).prompts()})
        plan.tokenizer.save_pretrained(hidden)
        if curve is not None:
            shutil.copyfile(curve, hidden / curve.name)
        card = model_card(read_description(hidden), training_of(plan, progress, curve))
        write_text_atomic(hidden / "README.md", card if edited is None else edited)
        if plan.data.labels is not None:
            write_json_atomic(adapter_labels(hidden), plan.data.labels)
    if edited is not None:
        observer.notice(f"{folder / 'README.md'} is kept as it was edited; where it is gone, a run writes a new one")
    if warning is not None:
        observer.display.warning(warning)
    observer.display.finish(
        f"finished after step {progress.step:,}", adapter=folder, curve=curve, chosen=chosen_text(progress, source)
    )


def final_checkpoint(plan: Plan, progress: Progress) -> Path:
    """The checkpoint that the final adapter is taken from: the best by the chosen metric, else the last, which is the one
    that was resumed from, wherever it lies, if no step was left to make."""
    step = progress.best["step"] if progress.best else progress.step
    if plan.checkpoint is not None and plan.checkpoint[1].step == step:
        return plan.checkpoint[0]
    return plan.run_dir.checkpoint(step)
