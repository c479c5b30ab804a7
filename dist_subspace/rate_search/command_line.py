"""The options of `dist-subspace find-lr`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_subspace.command_line import AsJson, ConfigPath, Overrides
from dist_subspace.launchers import enter, is_first


def find_lr(
    config: ConfigPath,
    overrides: Overrides = None,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Rates with commas between; unset: seven around the method's own, more where the best is at an end."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the rates that get furthest; unset: 80.")] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out samples of a comparison, drawn by the seed.")] = 512,
    output: Annotated[
        str | None, typer.Option(help="The folder for figures and picture; unset: RUN-find-lr, beside the run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the learning rate: short runs from one start, the better half goes on, by the loss on data.eval.

    Prints a table and the line to paste, and draws a picture. The run's own folder is not touched. For several processes:
    `deepspeed --module dist_subspace find-lr CONFIG ...`, `torchrun -m dist_subspace find-lr CONFIG ...`.
    """
    enter()  # before torch is imported, which looks at the devices
    if is_first():
        import sys

        print("starting: importing the libraries", file=sys.stderr, flush=True)
    from dist_subspace.placement.accelerator import choose_accelerator

    choose_accelerator()
    from dist_subspace.placement.process_group import leave_process_group
    from dist_subspace.rate_search.asked import Asked
    from dist_subspace.rate_search.command import find_lr as find

    asked = Asked(
        config=config,
        overrides=overrides or [],
        rates=rates,
        steps=steps,
        output=output,
        eval_samples=eval_samples,
        as_json=as_json,
    )
    status = find(asked)
    leave_process_group()
    raise typer.Exit(status)
