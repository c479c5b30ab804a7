"""The options of `dist-subspace generate`. Nothing heavy is imported here: `--help` reads it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from dist_subspace.errors import UsageError

AdapterPath = Annotated[str, typer.Argument(help="A run directory, a checkpoint, or an adapter's folder (PEFT's too).")]
PromptText = Annotated[
    str | None, typer.Option("--prompt", help="One prompt: an instruction, a user's turn, or a text to go on with.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Talk; /help lists what is understood.")]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", help="A file of prompts: the training's columns (.jsonl .json .csv .parquet), or lines (.txt)."
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", help="The .jsonl to write; half-answered, the same command goes on with it.")
]
System = Annotated[str | None, typer.Option(help="The system turn of a conversation.")]
Tools = Annotated[str | None, typer.Option(help="A JSON file with the list of tools that the chat template shows.")]
CompareBase = Annotated[bool, typer.Option("--compare-base", help="Show the base model's own answer beside it.")]
Format = Annotated[
    str | None, typer.Option(help="alpaca, chat, completion or text; unset: as in the adapter's training.")
]
Template = Annotated[str | None, typer.Option(help="Replaces alpaca's prompt, as data.template does.")]
Storage = Annotated[str | None, typer.Option(help="How the base is held; unset: as in training.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base model's folder or hub name; unset: the one that the adapter names.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Where the weights lie: none, zero0 (whole on each rank), zero3 (split), ...; as in training."),
]
SkipLong = Annotated[
    bool,
    typer.Option("--skip-long", help="Leave prompts without an answer that the model has no room for, and name them."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts of a file that are answered in one call on each rank.")]
Seed = Annotated[int, typer.Option(help="What is drawn, where the next token is drawn.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer; unset: the model's own, or 512.")]
Temperature = Annotated[float | None, typer.Option(help="Draw the next token; 0: take the likeliest.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of this share together.")]
TopK = Annotated[int | None, typer.Option(help="Draw among so many likeliest tokens.")]
MinP = Annotated[float | None, typer.Option(help="Draw among tokens at least this likely, beside the likeliest.")]
NumBeams = Annotated[int | None, typer.Option(help="Search with so many beams.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: what was said becomes less likely.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be given again.")]
GenerationFolder = Annotated[
    str | None,
    typer.Option("--generation-config", help="A folder with generation_config.json in the place of the model's own."),
]
Entries = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other entry of GenerationConfig: NAME=VALUE, for example no_repeat_ngram_size=3."),
]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. generation: entries of GenerationConfig that were given."""

    path: str
    prompt: str | None = None
    chat: bool = False
    input: str | None = None
    output: str | None = None
    system: str | None = None
    tools: str | None = None
    compare_base: bool = False
    format: str | None = None
    template: str | None = None
    base_model: str | None = None
    storage: str | None = None
    preset: str | None = None
    batch_size: int = 8
    skip_long: bool = False
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)
    generation_folder: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for options that contradict one another."""
        ways = {"--prompt": self.prompt is not None, "--chat": self.chat, "--input": self.input is not None}
        given = [name for name, is_given in ways.items() if is_given]
        if len(given) != 1:
            raise UsageError(
                f"{' and '.join(given) + ' are given together' if given else 'no prompt is given'}; accepted: one of "
                f"{', '.join(ways)}"
            )
        if (self.input is None) != (self.output is None):
            missing, there = ("--output", "--input") if self.output is None else ("--input", "--output")
            raise UsageError(f"{there} is given without {missing}; accepted: both, or neither")
        if self.skip_long and self.input is None:
            raise UsageError("--skip-long is given without --input; accepted: beside a file of prompts")


def generate(
    path: AdapterPath,
    prompt: PromptText = None,
    chat: Chat = False,
    input_file: Input = None,
    output_file: Output = None,
    system: System = None,
    tools: Tools = None,
    compare_base: CompareBase = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    num_beams: NumBeams = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    entries: Entries = None,
    generation_config: GenerationFolder = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_long: SkipLong = False,
    format: Format = None,
    template: Template = None,
    base_model: BaseModel = None,
    storage: Storage = None,
    preset: Preset = None,
) -> Asked:
    """Let an adapter answer: one prompt, a chat, or a file of prompts, asked as in its training.

    For example `dist-subspace generate runs/mine --prompt "Name three rivers." --compare-base`, or with `--chat`, or a file
    over all ranks: `torchrun --nproc-per-node 2 -m dist_subspace generate runs/mine --input asked.jsonl --output answered.jsonl`.
    Answers are on standard output, all else on standard error. Exit status: 0, 2 refused, 75 interrupted (run it again to go on).
    """
    named = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
    }
    return Asked(
        path=path,
        prompt=prompt,
        chat=chat,
        input=input_file,
        output=output_file,
        system=system,
        tools=tools,
        compare_base=compare_base,
        format=format,
        template=template,
        base_model=base_model,
        storage=storage,
        preset=preset,
        batch_size=batch_size,
        skip_long=skip_long,
        seed=seed,
        generation=generation_entries(named, stop, entries),
        generation_folder=generation_config,
    )


def generation_entries(
    named: Mapping[str, Any], stops: Sequence[str] | None, others: Sequence[str] | None
) -> dict[str, Any]:
    """The entries of GenerationConfig that were given, by their names there.

    Raises:
        UsageError: one that is no NAME=VALUE, or is given twice.
    """
    import yaml

    entries = {name: value for name, value in named.items() if value is not None}
    entries |= {"stop_strings": list(stops)} if stops else {}
    for text in others or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--set is {text!r}; accepted: NAME=VALUE, with a name of transformers' GenerationConfig")
        if name in entries:
            raise UsageError(f"--set is {text!r}, and {name} is given already; accepted: once")
        try:
            entries[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set is {text!r}, whose value cannot be read; accepted: a YAML value") from error
    return entries
