"""What the commands have in common: the program itself, its arguments, and how a command's help ends. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Fine-tune sharded, quantised transformers by their subspace adapters.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _keys_that_begin(incomplete: str) -> list[str]:
    """For the shell: keys of the configuration, each with its equals sign."""
    from dist_subspace.config.messages import dotted_keys
    from dist_subspace.config.schema import Config

    return [f"{key}=" for key in dotted_keys(Config) if key.startswith(incomplete)]


ConfigPath = Annotated[str, typer.Argument(help="A YAML configuration (`dist-subspace schema` describes every key).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to it: key=value, dotted, for example subspace.method=ssl training.max_steps=50.",
        autocompletion=_keys_that_begin,
    ),
]
AdapterPath = Annotated[
    str, typer.Argument(help="An adapter folder, a checkpoint folder, a run directory, or a Hub name.")
]
OutPath = Annotated[str, typer.Argument(help="The folder to write: new, or empty.")]
BaseModel = Annotated[
    str | None,
    typer.Option(help="The base model's folder or hub name; unset: the one that the adapter names, if found here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def command(name: str | None = None, *, example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command whose help ends with an example."""
    return app.command(name, epilog=f"Example: dist-subspace {example}")


@app.callback(invoke_without_command=True)
def _alone(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say the version, and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from dist_subspace import __version__

        print(f"dist-subspace {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(0)
