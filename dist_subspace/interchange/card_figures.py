"""What an evaluation has found, in the card of the adapter that it measured. Local; returns text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dist_subspace.interchange.card_signature import is_unedited, signed
from dist_subspace.interchange.card_training import data_name, hub_metric, is_hub_metric
from dist_subspace.interchange.card_usage import HEADING

Interval = tuple[float, float] | None
Figures = Mapping[str, tuple[float, Interval]]


def with_figures(card: str, data: str, figures: Figures, base: Figures | None = None) -> str:
    """The card with a table of the figures, and with them among the results that the Hub shows; in the place of an earlier
    table of the same data. A card that a person has edited is theirs, and stays.

    Arguments:
        data: what was measured on, a hub name or a file.
        figures: of the adapter, with their intervals of 95 %; those that are no finite numbers are left out.
        base: of the base model without it.
    """
    figures = {name: found for name, found in figures.items() if math.isfinite(found[0])}
    if not is_unedited(card) or not figures:
        return card
    from huggingface_hub import EvalResult, ModelCard

    named, parsed = data_name(data), ModelCard(card)
    head: Any = parsed.data
    heading = re.search(r"^# (.+)$", parsed.text, re.MULTILINE)
    others = [result for result in head.eval_results or [] if result.dataset_name != named]
    results = [
        EvalResult(
            task_type=head.get("pipeline_tag") or "other",
            dataset_type=named,
            dataset_name=named,
            metric_type=hub_metric(name),
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for name, (value, _) in figures.items()
    ]
    head.model_name = head.get("model_name") or (heading[1] if heading else "adapter")
    head.eval_results = [*others, *results]
    metrics = [hub_metric(name) for name in figures if is_hub_metric(name)]
    head.metrics = list(dict.fromkeys([*(head.get("metrics") or []), *metrics])) or None
    parsed.text = _with_section(parsed.text, f"## Measured on {named}", _table(figures, base))
    return signed(str(parsed))


def _table(figures: Figures, base: Figures | None) -> str:
    columns = [figures] if base is None else [figures, base]
    head = ["figure, with its interval of 95 %", "the adapter", "the base model"][: len(columns) + 1]
    rows = [[name.replace("_", " "), *(_cell(column.get(name)) for column in columns)] for name in figures]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: tuple[float, Interval] | None) -> str:
    if found is None:
        return ""
    value, interval = found
    return f"{value:.4g}" + ("" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]")


def _with_section(text: str, heading: str, table: str) -> str:
    """The text with the section, before how it is used, and in the place of one of the same heading."""
    section = f"{heading}\n\n{table}\n\n"
    there = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |^!\[)", re.DOTALL | re.MULTILINE)
    if there.search(text):
        return there.sub(lambda _: section, text, count=1)
    before, use, after = text.partition(HEADING)
    return before + section + use + after
