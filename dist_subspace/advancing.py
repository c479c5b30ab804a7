"""Moves a method's schedule on after an optimizer step, in anyone's loop: the gradients that attach let be collected are
averaged over the ranks, the schedule decides, and its edits are written wherever a copy of the parameter lies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import broadcast_tensors, summed_over_ranks
from dist_subspace.placement.edits import apply_edits, check_editable, restart_counters
from dist_subspace.placement.tensors import gathered
from dist_subspace.statistics.rounds import in_rounds
from dist_subspace.subspace import Attachment, Decomposes, Schedule, attached, attachment, trainable_parameters

Progress = Callable[[int, int], None]


def advance(model: nn.Module, step: int, max_steps: int, progress: Progress | None = None) -> None:
    """Collective: let the method's schedule (AdaLoRA, FlexLoRA, LoRA-Dash) decide what follows from optimizer step `step`.

    Call it once after each optimizer step, on every rank, before the next backward; `zero_grad` may come before or after. Other
    methods have no schedule, and nothing happens. In Hugging Face's Trainer and TRL's trainers `TrainerMixin` calls it.

    LoRA-Dash's strengths begin at zero in the middle of the run, and so do their moments. Adam's bias correction begins there too
    where the optimizer counts their steps apart: with ZeRO from stage 1 on, that is where it was given `parameter_groups` (by a
    Trainer's `create_optimizer`, whose own groups put them with A and B: then the correction goes on as it is).

    Arguments:
        model: what `attach` returned, or a wrapper (an engine) around it.
        step: the number of optimizer steps made, the first being 1. max_steps: how many there will be.
        progress: called with (layers done, layers in all) while frozen matrices are decomposed (LoRA-Dash, once).

    Raises:
        UsageError: for lengths of the schedule that do not fit into `max_steps`, and for an optimizer whose master copies of the
            parameters cannot be found (DeepSpeed's 16-bit engines at stage 0).
    """
    bare = _unwrapped(model)
    attached_method = attached(bare)
    schedule = attached_method.schedule
    if schedule is None:
        return
    schedule.check(max_steps)
    schedule.has_advanced = True
    gradients = _mean_gradients(attached_method, schedule.uses_gradients(step, max_steps))
    trained = [p for part in schedule.parts.values() for p in part.trainables().values()]
    check_editable(trained[0])
    with gathered(trained if schedule.reads_parameters(step, max_steps) else ()), torch.no_grad():
        decomposes = schedule.decomposes(step, max_steps)
        if decomposes:
            _decompose(schedule, progress)
        edits = schedule.advance(step, max_steps, gradients)
    apply_edits(edits)
    if decomposes:
        late = schedule.late_parameters()
        late_ids = {id(p) for p in late}
        schedule.begun = restart_counters(late, [p for p in trainable_parameters(bare) if id(p) not in late_ids])
    _collect_for(attached_method, schedule, step + 1, max_steps)


def discard(model: nn.Module) -> None:
    """Local: forget the gradients of a step that the optimizer did not make."""
    attached_method = attached(_unwrapped(model))
    attached_method.accumulation.restart()
    if attached_method.collector is not None:
        attached_method.collector.take()


def prepare_step(model: nn.Module, step: int, max_steps: int) -> None:
    """Local: the model is where it was after `step` steps, maybe fewer than have been made with it: no gradient of another step
    is kept, and those of the step that comes are collected where the schedule wants them."""
    discard(model)
    attached_method = attached(_unwrapped(model))
    if attached_method.schedule is not None:
        _collect_for(attached_method, attached_method.schedule, step + 1, max_steps)


def _collect_for(attached_method: Attachment, schedule: Schedule, step: int, max_steps: int) -> None:
    """Local: gradients of that step are collected, if the schedule asks for them."""
    if attached_method.collector is not None:
        attached_method.collector.paused = not schedule.uses_gradients(step, max_steps)


def _unwrapped(model: nn.Module) -> nn.Module:
    while attachment(model) is None and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _mean_gradients(attached_method: Attachment, wanted: bool) -> dict[str, Tensor]:
    """Collective where they are wanted: the step's gradients, the mean over the global batch, free of every scale, float32,
    by name; in one message with the weights that they are divided by. Empty where there was no backward, or where one of them
    is not finite: on all ranks alike, as all look at the same sums."""
    if attached_method.collector is None:
        return {}
    sums, total = attached_method.collector.take(), attached_method.accumulation.total
    attached_method.accumulation.restart()
    if not wanted:
        return {}
    device = next(iter(attached_method.collector.parameters.values())).device
    shapes = attached_method.collector.shapes
    pieces = [
        sums.pop(name).reshape(-1) if name in sums else torch.zeros(_numel(s), device=device)
        for name, s in shapes.items()
    ]
    counted = torch.tensor([total if pieces else 0.0], device=device)
    flat = summed_over_ranks(torch.cat([*pieces, counted]))
    weight = float(flat[-1])
    if weight == 0 or not bool(flat.isfinite().all()) or not bool(flat[:-1].any()):
        return {}
    mean = flat[:-1].div_(weight).split([_numel(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), mean, strict=True)}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _decompose(schedule: Schedule, progress: Progress | None) -> None:
    """Collective: every part's decomposition on one rank, and its result on all."""
    parts = {name: part for name, part in schedule.parts.items() if isinstance(part, Decomposes)}
    rounds = in_rounds(parts, lambda name, part, weight: part.decompose(weight), schedule.seed)
    for number, (name, owner, factors) in enumerate(rounds):
        parts[name].set_factors(broadcast_tensors(factors, owner))
        if progress is not None:
            progress(number + 1, len(parts))
