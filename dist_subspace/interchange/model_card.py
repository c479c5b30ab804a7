"""The README.md beside an adapter: what it is, how it is loaded, how it was trained. Local; returns text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_subspace.families.classes import AUTO_CLASSES
from dist_subspace.interchange.base_model import short_base

# PEFT's task_type -> (the Hub's pipeline, our name for the task)
PEFT_TASKS = {
    "CAUSAL_LM": ("text-generation", "causal-lm"),
    "SEQ_CLS": ("text-classification", "classification"),
    "TOKEN_CLS": ("token-classification", "token-classification"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "seq2seq-lm"),
}
_UNKNOWN = (None, "base")


def model_card(adapter_config: Mapping[str, Any], facts: Mapping[str, Any], model_class: str | None = None) -> str:
    """The card of an adapter, in Markdown with a YAML head that the Hub reads.

    Args:
        adapter_config: the adapter's description. With a `peft_type` the card shows how PEFT loads it too.
        facts: rows of the training table in their order, name to value (`eval_loss` is shown as "eval loss"); None is
            left out. `name` is the card's heading instead of a row.
        model_class: transformers' class that the adapter's names are of, where its task's auto class is another.
    """
    ours = adapter_config.get("dist_subspace") or {}
    method = str(ours.get("method") or adapter_config.get("peft_type") or "subspace").lower()
    base = short_base(str(adapter_config.get("base_model_name_or_path") or "BASE_MODEL"))
    parts = [
        _front_matter(adapter_config, method, base),
        f"# {facts.get('name') or f'{Path(base).name} with {method}'}",
        f"A `{method}` adapter for `{base}`: the frozen base model is not part of this folder.",
        _use(adapter_config, base, model_class),
        _table("The adapter", _adapter_facts(adapter_config, ours, method)),
        _table("Its training", {name: value for name, value in facts.items() if name != "name"}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: Mapping[str, Any], method: str, base: str) -> str:
    """The Hub wants a repository as `base_model`: a folder of this machine is none, and means nothing elsewhere."""
    pipeline = PEFT_TASKS.get(str(config.get("task_type")), _UNKNOWN)[0]
    head: dict[str, Any] = {"library_name": "peft" if config.get("peft_type") else "dist-subspace"}
    if _is_hub_name(base):
        head |= {"base_model": base, "base_model_relation": "adapter"}
    if pipeline:
        head["pipeline_tag"] = pipeline
    head["tags"] = list(dict.fromkeys(["dist-subspace", "subspace-tuning", method]))
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _use(config: Mapping[str, Any], base: str, model_class: str | None) -> str:
    _, task = PEFT_TASKS.get(str(config.get("task_type")), _UNKNOWN)
    auto_class = model_class or AUTO_CLASSES[task]
    other_task = f", task={task!r}" if task != "causal-lm" else ""
    load = "load_adapter" if config.get("dist_subspace") else "import_peft"
    revision = f", revision={_quoted(str(config['revision']))}" if config.get("revision") else ""
    ours = [
        "import dist_subspace as dsub",
        "",
        f'model = dsub.load_frozen({_quoted(base)}, storage="nf4"{other_task}{revision})',
        f'model = dsub.{load}(model, "path/to/this/folder")',
    ]
    sections = ["## How to load it", "With dist_subspace, in any storage of the frozen weights:", _code(ours)]
    if config.get("peft_type"):
        peft = [
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            "",
            f"model = {auto_class}.from_pretrained({_quoted(base)}{revision})",
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        ]
        sections += ["With PEFT:", _code(peft)]
    return "\n\n".join(sections)


def _adapter_facts(config: Mapping[str, Any], ours: Mapping[str, Any], method: str) -> dict[str, Any]:
    targets = ours.get("target_modules") or config.get("target_modules")
    return {
        "method": method,
        "rank": ours.get("rank", config.get("r")),
        "alpha": ours.get("alpha", config.get("lora_alpha")),
        "constraint": ours.get("constraint"),
        "target modules": targets,
        "layers": len(ours["layers"]) if ours.get("layers") else None,
        "trained in full": config.get("modules_to_save"),
    }


def _table(heading: str, facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {_cell(name.replace('_', ' '))} | {_cell(value)} |" for name, value in facts.items() if value is not None
    ]
    return "\n".join([f"## {heading}\n", "| | |", "|---|---|", *rows]) if rows else ""


def _cell(value: Any) -> str:
    """One line, and no bar that would end the cell; of a path of this machine the last name."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    else:
        text = Path(str(value)).name if os.path.isabs(str(value)) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_hub_name(base: str) -> bool:
    parts = base.split("/")
    return (
        len(parts) <= 2
        and base != "BASE_MODEL"
        and all(part and part[0].isalnum() for part in parts)
        and not Path(base).exists()
    )
