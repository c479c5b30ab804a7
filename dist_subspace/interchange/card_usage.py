"""How an adapter or a merged model is used: the lines of its card for each program that reads it. Local; returns Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.families.classes import AUTO_CLASSES
from dist_subspace.interchange.base_model import is_local, short_base
from dist_subspace.interchange.description import STACKS
from dist_subspace.interchange.peft.export_report import reader_notes
from dist_subspace.interchange.peft.written_forms import has_one_scale

# PEFT's task_type -> (the Hub's pipeline, our name for the task)
PEFT_TASKS = {
    "CAUSAL_LM": ("text-generation", "causal-lm"),
    "SEQ_CLS": ("text-classification", "classification"),
    "TOKEN_CLS": ("token-classification", "token-classification"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "seq2seq-lm"),
}
UNKNOWN_TASK = (None, "base")
HEADING = "## How to load it"
HERE = "path/to/this/folder"  # what is replaced by the repository's name where there is one
EXPORT = "peft"  # the folder of a repository with the form that PEFT reads, where the adapter's own is another
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def task_of(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The Hub's pipeline, and our name for the task."""
    return PEFT_TASKS.get(str(config.get("task_type")), UNKNOWN_TASK)


def usage(
    config: Mapping[str, Any], base: str, model_class: str | None, export: Mapping[str, Any] | None = None
) -> str:
    """The sections of an adapter's card.

    Arguments:
        config: the adapter's description. base: what its lines call the base model.
        model_class: transformers' class that the names in it are of, where its task's auto class is another.
        export: the description of the same adapter in PEFT's form, which lies beside it in the folder `EXPORT`.
    """
    _, task = task_of(config)
    revision = f", revision={_quoted(str(config['revision']))}" if config.get("revision") else ""
    auto_class = model_class or AUTO_CLASSES[task]
    other_task = f", task={task!r}" if task != "causal-lm" else ""
    load = "load_adapter" if config.get("dist_subspace") else "import_peft"
    ours = [
        "import dist_subspace as dsub",
        "",
        f'model = dsub.load_frozen({_quoted(base)}, storage="nf4"{other_task}{revision})',
        f'model = dsub.{load}(model, "{HERE}")',
    ]
    sections = [HEADING, "With dist_subspace, in any storage of the frozen weights:", _code(ours)]
    described = config if config.get("peft_type") else export
    if described is not None:
        inside = "" if described is config else f', subfolder="{EXPORT}"'
        peft = [
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            "",
            f"model = {auto_class}.from_pretrained({_quoted(base)}{revision})",
            f'model = PeftModel.from_pretrained(model, "{HERE}"{inside})',
        ]
        sections += ["With PEFT:", _code(peft)]
    served = next((each for each in (config, export) if each is not None and is_served(each)), None)
    if served is not None:
        sections += ["With vLLM:", _code(_vllm(served, base, is_export=served is not config), "bash")]
    return "\n\n".join(sections)


def merged_usage(config: Mapping[str, Any], model_class: str) -> str:
    """The sections of a merged model's card, whose class in transformers is `model_class`."""
    pipeline, task = task_of(config)
    auto_class = AUTO_CLASSES[task] if task != "base" else model_class
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("{HERE}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
    ]
    sections = [HEADING, "With transformers:", _code(lines)]
    if pipeline == "text-generation":
        sections += ["With vLLM:", _code([f"vllm serve {HERE}"], "bash")]
    return "\n\n".join(sections)


def is_served(config: Mapping[str, Any]) -> bool:
    """Whether vLLM reads these files: a LoRA of a language model, with one scale, on linear layers alone."""
    ours = config.get("dist_subspace") or {}
    stacked = ours.get(STACKS) or config.get("target_parameters")
    is_lora = config.get("peft_type") == "LORA" and config.get("task_type") == "CAUSAL_LM" and not stacked
    return is_lora and has_one_scale(config) and not reader_notes(config) and config.get("bias", "none") == "none"


def _vllm(config: Mapping[str, Any], base: str, is_export: bool) -> list[str]:
    ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    room = next((size for size in _VLLM_RANKS if size >= max(ranks)), max(ranks))
    serve = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} --lora-modules adapter="
    if not is_export:
        return [f"{serve}{HERE}"]
    return [f"hf download {HERE} --include '{EXPORT}/*' --local-dir adapter", f"{serve}adapter/{EXPORT}"]


def _code(lines: list[str], language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def shown_base(name: str | None) -> str:
    """What a card calls a base: a hub name, or a folder's own name without those around it on its machine."""
    short = short_base(str(name or "BASE_MODEL"))
    return f"path/to/{Path(short).name}" if is_local(short) else short
