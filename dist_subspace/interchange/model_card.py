"""The README.md beside an adapter or a merged model: what it is, how it is loaded, how it was trained. Local; returns text.

The head is huggingface_hub's `ModelCardData`, which the Hub checks; no path of this machine is in a card.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_subspace.interchange.card_signature import signed
from dist_subspace.interchange.card_training import Training, hub_metric
from dist_subspace.interchange.card_usage import PEFT_TASKS, merged_usage, shown_base, task_of, usage

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

__all__ = ["NO_LICENSE", "PEFT_TASKS", "merged_card", "model_card"]

NO_LICENSE = (
    "No license is named yet. Whoever publishes this names one in the head of this file (`license: ...`), in keeping with that "
    "of the base model."
)


def model_card(
    adapter_config: Mapping[str, Any],
    facts: Mapping[str, Any] | Training,
    model_class: str | None = None,
    export: Mapping[str, Any] | None = None,
) -> str:
    """The card of an adapter, in Markdown with a YAML head that the Hub reads.

    Args:
        adapter_config: the adapter's description. With a `peft_type` the card shows how PEFT loads it too.
        facts: what is known of its training, or the rows of the training's table alone, in their order, name to value
            (`eval_loss` is shown as "eval loss"); None is left out. `name` is the card's heading instead of a row.
        model_class: transformers' class that the adapter's names are of, where its task's auto class is another.
        export: as in `usage`.
    """
    training = facts if isinstance(facts, Training) else Training(facts)
    ours = adapter_config.get("dist_subspace") or {}
    method = str(ours.get("method") or adapter_config.get("peft_type") or "subspace").lower()
    base = shown_base(adapter_config.get("base_model_name_or_path"))
    name = str(training.facts.get("name") or f"{Path(base).name} with {method}")
    library = "peft" if adapter_config.get("peft_type") else "dist-subspace"
    parts = [
        f"# {name}",
        f"A `{method}` adapter for `{base}`: the frozen base model is not part of this folder.",
        _results(training),
        usage(adapter_config, base, model_class, export),
        _table("The adapter", _adapter_facts(adapter_config, ours, method)),
        *_how_it_was_trained(training),
    ]
    return _card(_head(adapter_config, method, base, library, "adapter", name, training), parts)


def merged_card(adapter_config: Mapping[str, Any], model_class: str, facts: Training | None = None) -> str:
    """The card of a model that an adapter was merged into, whose class in transformers is `model_class`."""
    training = facts or Training()
    ours = adapter_config.get("dist_subspace") or {}
    method, base = str(ours.get("method")), shown_base(adapter_config.get("base_model_name_or_path"))
    name = str(training.facts.get("name") or f"{Path(base).name} after {method}")
    parts = [
        f"# {name}",
        f"`{base}` with a `{method}` adapter merged into its weights: a plain transformers checkpoint.",
        _results(training),
        merged_usage(adapter_config, model_class),
        _table("The adapter", _adapter_facts(adapter_config, ours, method)),
        *_how_it_was_trained(training),
    ]
    return _card(_head(adapter_config, method, base, "transformers", "finetune", name, training), parts)


def _card(head: ModelCardData, parts: list[str]) -> str:
    from huggingface_hub import ModelCard

    text = "\n\n".join(part for part in parts if part)
    return signed(str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}\n")))


def _head(
    config: Mapping[str, Any], method: str, base: str, library: str, relation: str, name: str, training: Training
) -> ModelCardData:
    """The Hub wants a repository as `base_model`: a folder of this machine is none, and means nothing elsewhere."""
    from huggingface_hub import ModelCardData

    of_hub = _is_hub_name(base)
    results = _eval_results(config, training)
    return ModelCardData(
        library_name=library,
        base_model=base if of_hub else None,
        base_model_relation=relation if of_hub else None,
        pipeline_tag=task_of(config)[0],
        tags=list(dict.fromkeys(["dist-subspace", "subspace-tuning", method])),
        datasets=list(training.datasets) or None,
        metrics=training.metrics or None,
        model_name=name if results else None,
        eval_results=results or None,
        **training.license,
    )


def _eval_results(config: Mapping[str, Any], training: Training) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    kind = task_of(config)[0] or "other"
    return [
        EvalResult(
            task_type=kind,
            dataset_type=training.measured_on,
            dataset_name=training.measured_on,
            metric_type=hub_metric(name),
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for name, value in training.figures.items()
    ]


def _results(training: Training) -> str:
    picture = f"![loss over the steps]({training.picture})" if training.picture else ""
    figures = _table(f"Measured on {training.measured_on}", training.figures) if training.figures else ""
    return "\n\n".join(part for part in (figures, picture) if part)


def _how_it_was_trained(training: Training) -> list[str]:
    facts = {name: value for name, value in training.facts.items() if name != "name"}
    said = training.license.get("license")
    named = training.license.get("license_name") or said
    license_text = f"That of the base model: {named}." if said else NO_LICENSE
    return [_table("Its training", facts), f"## License\n\n{license_text}"]


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


def _is_hub_name(base: str) -> bool:
    from huggingface_hub.utils import validate_repo_id

    if base == "BASE_MODEL" or Path(base).exists():
        return False
    try:
        validate_repo_id(base)
    except ValueError:
        return False
    return base.count("/") <= 1
