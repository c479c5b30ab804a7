"""What a run shows that ends before its first step: settings, sizes and samples, as they would be trained. Local, rank 0."""

from __future__ import annotations

from dist_subspace.config import dump_config
from dist_subspace.report.quantities import bytes_text
from dist_subspace.training.display import Display
from dist_subspace.training.memory import peak_memory
from dist_subspace.training.plan import Plan, steps_text
from dist_subspace.training.rendering import show_samples

SAMPLES = 3


def show_dry_run(plan: Plan, display: Display) -> None:
    """The model is loaded, the engine is made, and a checkpoint is taken up, if there is one."""
    display.notice("settings:\n" + "\n".join(f"  {line}" for line in dump_config(plan.config).splitlines()))
    table = plan.data.train
    first, form = plan.batches.first_samples(SAMPLES), plan.config.data.format
    show_samples(display.console, plan.tokenizer, table, first, plan.data.labels, form)
    display.notice(f"{steps_text(plan)}; peak memory so far {bytes_text(peak_memory(plan.device))} on rank 0")
    begun = "the first step" if plan.checkpoint is None else f"step {plan.checkpoint[1].step + 1:,}"
    display.finish(f"dry run: everything up to {begun} works; nothing was trained")
