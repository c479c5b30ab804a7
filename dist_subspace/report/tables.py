"""The methods as a person reads them: a table of all, a card of one; and everything about them for `--json`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dist_subspace.families.projections import KEY_VALUE_UP
from dist_subspace.subspace import MethodInfo
from dist_subspace.subspace.core.constraints import CONSTRAINTS, constraint_options
from dist_subspace.subspace.core.learning_rate import WIDTHS

# The paper's terms (arXiv 2407.05417; docs/methods.md, "The framework"), in the order of the table.
CATEGORIES = {
    "reconstruction, mode 1": "singular values change, singular vectors stay",
    "reconstruction, mode 2": "the subspaces that W has are reshaped",
    "extension": "directions that W has not are added",
    "combination": "both",
}
NARROWEST, WIDE = 80, 112  # columns; from WIDE on, options have room beside the rest
NO_REASON = "it has no pair of trained low-rank factors"


def targets_text(info: MethodInfo) -> str:
    if info.targets == KEY_VALUE_UP:
        return "key, value, FFN-up"
    return info.targets if isinstance(info.targets, str) else ", ".join(info.targets)


def methods_table(methods: Mapping[str, MethodInfo]) -> list[dict[str, Any]]:
    """Everything about each method, for `--json`."""
    return [
        {
            "name": info.name,
            "category": info.category,
            "summary": info.summary,
            "arxiv": info.reference,
            "parameters_a_layer": info.count,
            "targets": targets_text(info),
            "chooses_targets": info.uses_targets,
            "learning_rates": info.learning_rate.by_width(),
            "learning_rate_source": info.learning_rate.source,
            "learning_rate_divided_by": info.learning_rate.effect_text,
            "rank": info.rank,
            "alpha_over_rank": info.alpha_over_rank,
            "uses_rank": info.uses_rank,
            "uses_dropout": info.uses_dropout,
            "statistic": info.statistic,
            "mergeable": info.mergeable,
            "identity_at_the_start": info.identity,
            "peft_type": info.peft_type,
            "constraints": list(info.constraints),
            "constraint": info.constraint,
            "constraint_refusals": _refusals(info),
            "constraint_notices": dict(info.notices),
            "options": {
                name: {"default": option.default, "accepted": option.accepted, "help": option.help}
                for name, option in info.options.items()
            },
        }
        for info in methods.values()
    ]


def methods_text(methods: Mapping[str, MethodInfo], width: int) -> str:
    """One table, grouped by category; in a narrow terminal options come in a second one."""
    width = max(width, NARROWEST)
    count = min(38, max(20, (width - 60) // 3))
    widths = [19, 10, count, 9, 6, 6] + ([width - 62 - count] if width >= WIDE else [])
    lines = _row(("method", "arXiv", "trained in a layer", "statistic", "merges", "MPC", "settings (default)"), widths)
    lines.append("-" * width)
    for category, meaning in CATEGORIES.items():
        lines.append(f"{category}: {meaning}")
        for info in _of(category, methods):
            cells = (info.name, info.reference, info.count, info.statistic, _yes(info.mergeable), _marks(info))
            lines += _row((*cells, _settings(info)), widths)
        lines.append("")
    if width < WIDE:
        lines += ["settings (default)", "-" * width]
        lines += [
            line for m in methods.values() if _settings(m) for line in _row((m.name, _settings(m)), [19, width - 21])
        ]
        lines.append("")
    return "\n".join(lines + _notes(methods, width))


def method_text(info: MethodInfo, width: int) -> str:
    """The card of one method."""
    facts = [
        (info.name, info.summary),
        ("category", f"{info.category} ({CATEGORIES[info.category]})"),
        ("reference", f"arXiv {info.reference}"),
        ("trained", f"{info.count} in a layer" if info.uses_targets else info.count),
        ("targets", targets_text(info) + ("" if info.uses_targets else " (not chosen)")),
        ("rank", f"{info.rank}" + (f", alpha {info.alpha_over_rank:g} times the rank" if info.alpha_over_rank else "")),
        ("learning rate", _rate_text(info)),
        ("dropout", "on the method's own branch" if info.uses_dropout else "none"),
        ("statistic", info.statistic + ("" if info.statistic == "none" else " of the frozen matrix, once")),
        ("merges", _yes(info.mergeable)),
        ("PEFT", f"reads its files as {info.peft_type}" if info.peft_type else "does not read its files"),
    ]
    shown = [(name, text) for name, text in facts if name != "rank" or info.uses_rank]
    shown += [(name, _constraint_text(info, name)) for name in CONSTRAINTS[1:]]
    lines = [line for pair in shown for line in _row(pair, [13, max(width, NARROWEST) - 15])]
    if info.options:
        lines += ["", "options"]
    for name, option in info.options.items():
        text = f"{option.help} [{value_text(option.default)}]; accepted: {option.accepted}"
        lines += _row((f"  {name}", text), [22, max(width, NARROWEST) - 24])
    return "\n".join(lines)


def _of(category: str, methods: Mapping[str, MethodInfo]) -> list[MethodInfo]:
    return [info for info in methods.values() if info.category == category]


def _settings(info: MethodInfo) -> str:
    """Learning rate, rank, alpha and the method's options with their defaults; those of its constraints are said once for all."""
    shared = constraint_options(info.constraints)
    alpha = {None: "", 1.0: "r"}.get(info.alpha_over_rank, f"{info.alpha_over_rank:g}r" if info.alpha_over_rank else "")
    parts = [f"learning_rate={_brief_rate(info)}"]
    parts += [f"rank={info.rank}"] if info.uses_rank else []
    parts += [f"alpha={alpha}"] if alpha else []
    parts += [f"{name}={value_text(option.default)}" for name, option in info.options.items() if name not in shared]
    return ", ".join(parts)


def value_text(value: Any) -> str:
    """As YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _brief_rate(info: MethodInfo) -> str:
    """`0.002 to 0.0002`."""
    return f"{info.learning_rate.middle:g} to {info.learning_rate.wide:g}"


def _rate_text(info: MethodInfo) -> str:
    declared = info.learning_rate
    rates = ", ".join(f"{rate:g} for {width:,}" for width, rate in declared.by_width().items())
    divided = f"; divided by {declared.effect_text} over its own" if declared.effect_text else ""
    return f"{rates} inputs a matrix (the last: {declared.source}){divided}"


def _marks(info: MethodInfo) -> str:
    """`o* d n`: the constraints it can have, by their last letters; the starred one is its own."""
    return " ".join(f"{kind[-1]}{'*' if kind == info.constraint else ''}" for kind in info.constraints) or "-"


def _notes(methods: Mapping[str, MethodInfo], width: int) -> list[str]:
    constrained = [name for name, info in methods.items() if info.constraint != "none"]
    notes = [
        "trained in a layer: d_in and d_out are its sides, r the rank; of a model, with n virtual tokens: d its width, "
        "d_kv that of its keys, h of the encoder.",
        "MPC: the matrix pattern constraints mpc_o, mpc_d, mpc_n that it can have"
        + (f" (* unless told otherwise: {', '.join(constrained)})" if constrained else "")
        + "; o and d bring the options power and reduction, n the option activation; under n nothing merges.",
        f"learning_rate: what auto is for {WIDTHS[1]} and for {WIDTHS[2]:,} inputs a matrix.",
        "dist-subspace methods NAME says more of one method, --json everything of all.",
    ]
    return [line for note in notes for line in textwrap.wrap(note, width)]


def _refusals(info: MethodInfo) -> dict[str, str]:
    return {kind: info.refusals.get(kind, NO_REASON) for kind in CONSTRAINTS[1:] if kind not in info.constraints}


def _constraint_text(info: MethodInfo, kind: str) -> str:
    if kind not in info.constraints:
        return f"no: {_refusals(info)[kind]}"
    remark = "; its own, unless told otherwise" if kind == info.constraint else ""
    return f"yes{remark}" + (f"; {info.notices[kind]}" if kind in info.notices else "")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The cells side by side, each wrapped to its column; cells beyond the last width are left out."""
    wrapped = [textwrap.wrap(cell, wide) or [""] for cell, wide in zip(cells, widths, strict=False)]
    lines = []
    for number in range(max(map(len, wrapped))):
        pieces = [column[number] if number < len(column) else "" for column in wrapped]
        lines.append("  ".join(f"{piece:<{wide}}" for piece, wide in zip(pieces, widths, strict=False)).rstrip())
    return lines
