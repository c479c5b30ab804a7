"""The options of `dist-subspace eval`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_subspace.launchers import enter

Text = str | None


def evaluate(
    target: Annotated[
        Text, typer.Argument(help="A configuration, whose data.eval is measured, a run, a checkpoint or an adapter.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to its configuration: key=value, for example model.storage=nf4.")
    ] = None,
    base: Annotated[Text, typer.Option(help="A model's folder or hub name, measured without an adapter.")] = None,
    data: Annotated[Text, typer.Option(help="A file or Hub data set in the place of data.eval.")] = None,
    metrics: Annotated[Text, typer.Option(help="Names with commas between; unset: those that suit the task.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A choice of every record; given once for each.")] = None,
    choices_field: Annotated[Text, typer.Option(help="The column with a record's own list of choices.")] = None,
    answer_field: Annotated[
        Text, typer.Option(help="The column with the right choice, its text or its number from 0.")
    ] = None,
    answer_regex: Annotated[
        Text,
        typer.Option(
            help="Finds the answer in what is written and in what is wanted: the last place, its first group."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer that is written.")] = 256,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a forward call; unset: as in training.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure the first samples alone.")] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Measure the base without the adapter, too.")
    ] = False,
    predictions: Annotated[
        Text, typer.Option(help="A file for each sample's result; one that was begun is gone on with.")
    ] = None,
    tasks: Annotated[Text, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    tasks_folder: Annotated[Text, typer.Option(help="A folder with task files of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.")] = None,
    output: Annotated[Text, typer.Option(help="A file for the figures, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure an adapter, or a model: loss, classes, multiple choice, written answers.

    Example: dist-subspace eval runs/mine --data test.jsonl --compare-base

    For several processes: `deepspeed --module dist_subspace eval RUN ...`, `torchrun -m dist_subspace eval RUN ...`.
    """
    enter()  # before torch is imported, which looks at the devices
    from dist_subspace.placement.accelerator import choose_accelerator

    choose_accelerator()
    from dist_subspace.evaluation.asked import Asked
    from dist_subspace.evaluation.choices import AskedChoices
    from dist_subspace.evaluation.command import evaluate as measure
    from dist_subspace.placement.process_group import leave_process_group

    asked = Asked(
        target=target,
        overrides=overrides or [],
        base=base,
        data=data,
        metrics=_names(metrics),
        choices=AskedChoices(tuple(choice or ()), choices_field, answer_field),
        answer_regex=answer_regex,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        compare_base=compare_base,
        predictions=predictions,
        as_json=as_json,
        output=output,
        tasks=_names(tasks),
        tasks_folder=tasks_folder,
        num_fewshot=num_fewshot,
    )
    status = measure(asked)
    leave_process_group()
    raise typer.Exit(status)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
