"""The command line: one function a command, each a few lines over the library."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_subspace.atomic_files import StorageError
from dist_subspace.command_line import AdapterPath, AsJson, BaseModel, ConfigPath, OutPath, Overrides, app, command
from dist_subspace.cuda_allocator import let_segments_grow
from dist_subspace.doctor import PATIENCE
from dist_subspace.errors import Notice, UsageError
from dist_subspace.evaluation.command_line import evaluate
from dist_subspace.launchers import enter, is_first, without_local_rank
from dist_subspace.rate_search.command_line import find_lr
from dist_subspace.stopping import Interrupted, listening
from dist_subspace.talking import options as generate_options
from dist_subspace.training.pulse import Pulse


@command(example="train my.yaml training.max_steps=50")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Do everything up to the first step, show samples, sizes and settings, and leave."
        ),
    ] = False,
) -> None:
    """Train an adapter. One process; for several: `deepspeed launch/train.py CONFIG KEY=VALUE ...`.

    Exit status: 0 finished, 2 refused (one sentence says why), 75 interrupted (run it again to continue), 1 failed.
    """
    nested = enter().nested_text()  # before torch is imported, which looks at the devices
    let_segments_grow()
    if nested is not None and is_first():
        print(nested, flush=True)
    with listening() as stop:
        try:
            with stop.leavable(), stop.interruptible():
                run, leave_process_group = _training()
        except Interrupted as told:
            if is_first():
                print(f"interrupted by {told} while starting; run the same command to continue", file=sys.stderr)
            raise typer.Exit(75) from None
        status = run(config, overrides or [], logs=True, dry=dry_run)
        leave_process_group()
    raise typer.Exit(status)


def _training() -> tuple[Callable[..., int], Callable[[], None]]:
    """The training loop, and with it torch, transformers and DeepSpeed: seconds, a minute on a slow disk."""
    say = print if is_first() else lambda *words, **how: None
    say("starting: importing the libraries", flush=True)
    pulse = Pulse(lambda: say("still importing the libraries: the disk may be slow", flush=True), first=20.0)
    try:
        _choose_accelerator()
        from dist_subspace.placement.process_group import leave_process_group
        from dist_subspace.training.run import train as run
    finally:
        pulse.close()
    return run, leave_process_group


@command(example="methods dora")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, of which everything is said.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the subspace methods: category and mode, reference, what is trained, statistic, merging, constraints, settings."""
    from dist_subspace.report.tables import method_text, methods_table, methods_text
    from dist_subspace.subspace import method_class
    from dist_subspace.subspace import methods as registered

    infos = registered() if name is None else {name: method_class(name).info}
    if as_json:
        print(json.dumps(methods_table(infos), indent=2))
        return
    width = shutil.get_terminal_size((100, 24)).columns
    print(methods_text(infos, width) if name is None else method_text(infos[name], width))


@command(example="inspect runs/mine --picture moved.png")
def inspect(
    path: AdapterPath,
    picture: Annotated[
        str | None,
        typer.Option(help="Draw norms and effective ranks by depth and kind of module: a PNG's path, or a folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what an adapter is, and what it did: method, settings, sizes, how far each layer moved and in how many directions.

    Reads the adapter's own files alone, no base model. Writes nothing unless --picture is given.
    """
    from dist_subspace.report.adapter import adapter_report, adapter_text

    report = adapter_report(_adapter_folder(path))
    print(json.dumps(report, indent=2)) if as_json else print(adapter_text(report))
    if picture is not None:
        from dist_subspace.report.adapter_picture import adapter_picture

        print(f"picture: {adapter_picture(report, picture)}", file=sys.stderr if as_json else sys.stdout)


@command(example="merge runs/mine merged --dtype bfloat16")
def merge(
    adapter: AdapterPath,
    out: OutPath,
    base: Annotated[
        str, typer.Option(help="What the update is merged into: dequantised (what the training used) or original.")
    ] = "dequantised",
    dtype: Annotated[
        str | None, typer.Option(help="Of the written weights: float32, bfloat16, float16; unset: as computed.")
    ] = None,
    base_model: BaseModel = None,
    storage: Annotated[
        str | None, typer.Option(help="How the base is held while it is merged; unset: as in training.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one plain transformers checkpoint, and say how far the two bases are apart.

    The base is loaded as it was held in training, in one process; the checkpoint is written a layer at a time, and appears whole
    or not at all.
    """
    _choose_accelerator()
    from dist_subspace.api import load_adapted
    from dist_subspace.interchange.adapter_folder import AdapterFolder
    from dist_subspace.interchange.merge import merge as write
    from dist_subspace.interchange.plain import refuse_unmergeable
    from dist_subspace.subspace import resolve

    _leave_on_termination()
    opened = AdapterFolder(_adapter_folder(adapter), verify=True)
    resolved = resolve(opened.config)
    refuse_unmergeable(resolved.info, resolved.settings)
    model = load_adapted(opened, base_model, storage)
    made = write(model, out, base, dtype=dtype, tokenizer=opened.tokenizer(), report=None)
    print(json.dumps(made.as_dict(), indent=2) if as_json else made)


@command(example="export runs/mine for-peft")
def export(
    adapter: AdapterPath,
    out: OutPath,
    form: Annotated[
        str, typer.Option(help="direct (the method is PEFT's), lora, scaling, or auto: the first that is exact.")
    ] = "auto",
    approximate_rank: Annotated[
        int | None, typer.Option(help="Where nothing is exact: a LoRA of this rank, with its error.")
    ] = None,
    for_class: Annotated[
        str,
        typer.Option(
            help="Of a text model from a vision-language checkpoint: names of the checkpoint's class, or trained."
        ),
    ] = "checkpoint",
    base_model: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a folder that PEFT and vLLM read: exactly, or as an approximation where one is asked for.

    The base model is needed for an approximation alone (--base-model).
    """
    _choose_accelerator()
    from dist_subspace.api import load_adapted
    from dist_subspace.interchange.peft.export import export_peft

    folder = _adapter_folder(adapter)
    source = folder if base_model is None else load_adapted(folder, base_model)
    made = export_peft(source, out, form, for_class=for_class, approximate_rank=approximate_rank, report=None)
    print(json.dumps(made.as_dict(), indent=2) if as_json else made)


@command("import", example="import from-peft ours")
def import_(
    peft_adapter: Annotated[str, typer.Argument(help="An adapter that PEFT wrote: a folder, or a Hub name.")],
    out: OutPath,
    base_model: BaseModel = None,
) -> None:
    """Write an adapter of PEFT as an adapter folder of ours, which load_adapter, merge, export and inspect read.

    The base model is needed for PiSSA and OLoRA alone, whose start is made from it (--base-model).
    """
    _choose_accelerator()
    from dist_subspace.api import rewrite_on_base
    from dist_subspace.checkpoint.fingerprint import base_fingerprint
    from dist_subspace.interchange.hub_adapter import adapter_here
    from dist_subspace.interchange.peft.importing import rewrite_peft

    source = adapter_here(peft_adapter, "PEFT_ADAPTER")
    if base_model is None:
        imported = rewrite_peft(source, out, base_fingerprint)
    else:
        imported = rewrite_on_base(source, out, base_model)
    print(
        f"{out}: PEFT's {imported.described['peft_type']} as {imported.config.method}, {len(imported.tensors)} tensors"
    )


@command(example="push runs/mine user/my-adapter")
def push(
    adapter: Annotated[
        str, typer.Argument(help="A run directory, an adapter or checkpoint folder, or the folder of a merged model.")
    ],
    name: Annotated[str, typer.Argument(help="The repository: user/name. It is made where there is none.")],
    merged: Annotated[bool, typer.Option("--merged", help="Push base and adapter as one plain model.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to write to; unset: main.")] = None,
    base_model: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Push an adapter, with its card, to the Hugging Face Hub.

    The token is HF_TOKEN's, or that of `hf auth login`. Checkpoints, optimizer state and logs stay here.
    """
    _choose_accelerator()
    from dist_subspace.publishing.command import push_path
    from dist_subspace.publishing.repository import Repository

    _leave_on_termination()
    repository = Repository(name, revision=revision, private=private or None)
    made = push_path(
        adapter, repository, _adapter_folder, lambda text: print(text, file=sys.stderr), merged, base_model
    )
    print(json.dumps(made.as_dict(), indent=2) if as_json else made)


@command(example='generate runs/mine --prompt "Name three colours."')
@wraps(generate_options.generate)
def generate(**given: Any) -> None:
    enter()
    try:
        asked = generate_options.generate(**given)
    except UsageError:
        if is_first():  # every rank has the same options
            raise
        raise typer.Exit(2) from None
    if is_first():
        print("starting: importing the libraries", file=sys.stderr, flush=True)
    _choose_accelerator()
    from dist_subspace.talking.command import generate as answer

    raise typer.Exit(answer(asked))


@command(example="report runs/mine")
def report(run_dir: Annotated[str, typer.Argument(help="The output_dir of a run.")]) -> None:
    """Summarise a run and draw its loss curve (RUN_DIR/loss.png); works while it runs, too."""
    from dist_subspace.report.curve import loss_curve
    from dist_subspace.report.run import run_report

    if not Path(run_dir).is_dir():
        raise UsageError(f"RUN_DIR is {run_dir!r}, which is no folder; accepted: the output_dir of a run")
    print(run_report(run_dir))
    print(f"loss curve: {loss_curve(run_dir)}")


command("eval", example="eval runs/mine --compare-base")(evaluate)
command("find-lr", example="find-lr my.yaml subspace.method=ssb")(find_lr)


@command(example="doctor my.yaml")
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="A YAML configuration: its paths, its sizes and its values are examined too.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    patience: Annotated[float, typer.Option(help="Seconds for the ranks to come; who does not is named.")] = PATIENCE,
) -> None:
    """Say what will break before a run finds out, and what to do: here, or under any launcher on all ranks at once
    (`deepspeed --module dist_subspace doctor`, `torchrun -m dist_subspace doctor`, `srun python -m dist_subspace doctor`).

    Exit status, on all ranks: 0 nothing will break, 1 something will.
    """
    from dist_subspace.doctor.command import doctor as examine

    examine(config, overrides or [], as_json, patience)


@command(example="schema training.learning_rate")
def schema(
    key: Annotated[str | None, typer.Argument(help="One key, or a section, to explain in words.")] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print a recipe with every key, its default and a word.")
    ] = False,
) -> None:
    """Print the configuration's JSON schema, for editors; or explain one KEY; or write a commented recipe (--yaml)."""
    if key is not None or as_yaml:
        from dist_subspace.report.keys import explained, recipe_text

        print(recipe_text() if key is None else explained(key), end="" if key is None else "\n")
        return
    from dist_subspace.config import config_schema

    print(json.dumps(config_schema(), indent=2))


@command(example="preview my.yaml -n 3")
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--samples", min=0, help="How many samples are shown.")] = 5,
) -> None:
    """Show samples as the model will see them, with what is trained in colour, and what the data come to: tokens, lengths, what
    is cut or left out, what packing gains. The first thing to run on data of one's own; needs no GPU.
    """
    _choose_accelerator()
    from dist_subspace.training.preview import preview as show

    show(config, overrides or [], count)


@command(example="prepare my.yaml")
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tokenise the data of a run ahead of it, on a machine without a GPU; the run finds them by the same key."""
    _choose_accelerator()
    from dist_subspace.training.preview import prepare_run, prepared_text

    print(prepared_text(prepare_run(config, overrides or [])))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. A `UsageError` is one sentence on standard error, and status 2."""
    try:
        with _plain_notices():
            result = app(
                args=without_local_rank(sys.argv[1:] if arguments is None else arguments), standalone_mode=False
            )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except typer.Exit as stop:
        return int(stop.exit_code)
    except typer.Abort:
        return 130
    except Exception as error:
        shown = getattr(error, "format_message", None)  # click's own complaints about arguments
        if shown is None:
            raise
        print(f"error: {shown()}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return int(result) if isinstance(result, int) else 0


@contextmanager
def _plain_notices() -> Iterator[None]:
    """Our own notices are one line of standard error each, without the place in the code that gave them."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print(f"notice: {message}", file=sys.stderr)
        else:
            before(message, category, *place, **more)

    with warnings.catch_warnings():
        before = warnings.showwarning
        warnings.showwarning = show
        yield


def _choose_accelerator() -> None:
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "5"
    )  # torch's profiler speaks of its stages, unless it is told before its import
    from dist_subspace.placement.accelerator import choose_accelerator

    choose_accelerator()


def _leave_on_termination() -> None:
    """A termination is an exit like any other, so that what is half-written is removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _adapter_folder(path: str) -> Path:
    """The adapter in a run directory is its final one, else that of the newest checkpoint."""
    from dist_subspace.adapted.source import adapter_folder

    return adapter_folder(path)
