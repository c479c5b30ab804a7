"""What an adapter is, and what it did to its base: read from its two files alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.base_model import short_base
from dist_subspace.interchange.tensor_names import FACTOR
from dist_subspace.report.movement import MEANING, RANK_MEANING, Movement, movements
from dist_subspace.report.places import places
from dist_subspace.report.quantities import bytes_text
from dist_subspace.report.tables import targets_text, value_text
from dist_subspace.subspace import MethodInfo, methods
from dist_subspace.subspace.core.peft_words import PREFIX
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

SHOWN = 10  # layers of the list of those that moved most


def adapter_report(folder: str | Path) -> dict[str, Any]:
    """Everything that `dist-subspace inspect --json` prints: settings, sizes, each layer's movement, each tensor's norm.

    Raises:
        UsageError: for a folder without an adapter, a file that is cut short, or tensors that are not the method's.
    """
    adapter = AdapterFolder(folder)
    identity = _identity(adapter)
    moved = list(movements(adapter))
    factors = [key for key in adapter.keys if f".{FACTOR}" in key]
    return {
        **identity,
        "layers": len(moved),
        "parameters": sum(m.trained for m in moved) + sum(_numel(adapter, key) for key in _beside_layers(adapter)),
        "values_in_the_file": sum(_numel(adapter, key) for key in adapter.keys),
        "bytes": adapter.bytes,
        "norm_of": "; ".join(dict.fromkeys(MEANING[m.kind] for m in moved)) or None,
        "by_module": _by_module(moved),
        "by_layer": [{**asdict(m), "depth": place.depth, "module": place.kind} for m, place in _placed(moved)],
        "by_token": _token_norms(adapter),
        "norms": {
            key.removeprefix(PREFIX): float(adapter.tensor(key).float().norm())
            for key in adapter.keys
            if key not in factors
        },
    }


def _identity(adapter: AdapterFolder) -> dict[str, Any]:
    ours, described = adapter.ours, adapter.described
    info = methods().get(str(ours.get("method")))
    if ours.get("method") and info is None:
        raise UsageError(f"{adapter.path} is an adapter of method {ours['method']!r}, which this version does not know")
    constraint = ours.get("constraint") or (info.constraint if info else None)
    return {
        "folder": str(adapter.path),
        "method": ours.get("method") or described.get("peft_type"),
        "summary": info.summary if info else None,
        "category": info.category if info else None,
        "reference": info.reference if info else None,
        "mergeable": info.mergeable and constraint != "mpc_n" if info else None,
        "format": f"dist_subspace {ours['format']}" if ours else "PEFT",
        "peft_type": described.get("peft_type"),
        "base_model": short_base(described.get("base_model_name_or_path") or "") or None,
        "task": described.get("task_type"),
        "rank": ours.get("rank", described.get("r")),
        "alpha": ours.get("alpha", described.get("lora_alpha")),
        "dropout": ours.get("dropout", described.get("lora_dropout")),
        "targets": ours.get("target_modules") or (_own_targets(info) if info else described.get("target_modules")),
        "constraint": None if constraint == "none" else constraint,
        "options": ours.get("options") or {},
        "rank_pattern": ours.get("rank_pattern") or described.get("rank_pattern") or {},
        "modules_to_save": described.get("modules_to_save") or [],
        "new_tokens": len(ours.get("new_tokens") or []),
        "seed": ours.get("seed"),
    }


def _own_targets(info: MethodInfo) -> str:
    return f"the method's own: {targets_text(info)}"


def _token_norms(adapter: AdapterFolder) -> list[float]:
    """Of each virtual token, where the adapter is made of such."""
    if EMBEDDINGS not in adapter.keys:
        return []
    return [float(norm) for norm in adapter.tensor(EMBEDDINGS).float().norm(dim=1)]


def _beside_layers(adapter: AdapterFolder) -> list[str]:
    """Tensors of no layer of the method: modules trained in full, new tokens."""
    starts = tuple(f"{PREFIX}{layer}." for layer in adapter.layers)
    return [key for key in adapter.keys if key.startswith(PREFIX) and starts and not key.startswith(starts)]


def _numel(adapter: AdapterFolder, key: str) -> int:
    count = 1
    for side in adapter.shape(key):
        count *= side
    return count


def _placed(moved: Sequence[Movement]) -> list[tuple[Movement, Any]]:
    where = places(m.layer for m in moved)
    return [(m, where[m.layer]) for m in moved]


def _by_module(moved: Sequence[Movement]) -> list[dict[str, Any]]:
    """A row a kind of module: how many layers, their mean norm and effective rank, and the layer that moved most."""
    kinds: dict[str, list[Movement]] = {}
    for movement, place in _placed(moved):
        kinds.setdefault(place.kind, []).append(movement)
    rows = []
    for kind, group in kinds.items():
        most = max(group, key=lambda m: m.norm)
        ranks = [m.effective_rank for m in group if m.effective_rank is not None]
        rows.append(
            {
                "module": kind,
                "layers": len(group),
                "norm": sum(m.norm for m in group) / len(group),
                "effective_rank": sum(ranks) / len(ranks) if ranks else None,
                "rank": max((m.rank for m in group if m.rank is not None), default=None),
                "most": most.norm,
                "most_layer": most.layer,
            }
        )
    return rows


# As text.


def adapter_text(report: Mapping[str, Any], width: int | None = None) -> str:
    """The report for a terminal: what it is, a table by kind of module, and the layers that moved most and least."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    lines = [f"{name:<15}{text}" for name, text in _facts(report) if text]
    if not report["by_layer"]:
        return "\n".join(lines)
    ranked = sorted(report["by_layer"], key=lambda row: -row["norm"])
    with_ranks = any(row["effective_rank"] is not None for row in ranked)
    angles = [row["angle"] for row in ranked if row["angle"] is not None]
    lines += ["", f"norm: {report['norm_of']}"] + ([RANK_MEANING] if with_ranks else [])
    lines += [f"largest angle: {max(angles):.3g} degrees"] if angles else []
    lines += ["", *_module_lines(report["by_module"], with_ranks)]
    if len(ranked) > 1:
        lines += ["", *_layer_lines("moved most", ranked[:SHOWN], with_ranks, width)]
    if len(ranked) > 2 * SHOWN:
        lines += ["", *_layer_lines("moved least", ranked[: -SHOWN // 2 - 1 : -1], with_ranks, width)]
    return "\n".join(lines)


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    about = ", ".join(str(report[key]) for key in ("category",) if report[key])
    reference = f"arXiv {report['reference']}" if report["reference"] else ""
    settings = [f"{key} {report[key]:g}" for key in ("rank", "alpha", "dropout") if report[key]]
    settings += [f"constraint {report['constraint']}"] if report["constraint"] else []
    settings += [f"{name}={value_text(value)}" for name, value in report["options"].items()]
    targets = report["targets"]
    where = f"{report['layers']:,} layer{'s' if report['layers'] != 1 else ''}"
    where = f"{len(report['by_token'])} virtual tokens" if report["by_token"] else where
    frozen = report["values_in_the_file"] - report["parameters"]
    frozen_text = f", {frozen:,} frozen ones beside them" if frozen > 0 else ""
    merges = {None: "", True: "yes", False: "no"}[report["mergeable"]]
    return [
        ("adapter", report["folder"]),
        ("method", f"{report['method']}  ({', '.join(part for part in (about, reference) if part)})"),
        ("", report["summary"] or ""),
        ("base model", report["base_model"] or "not named"),
        ("settings", ", ".join(settings)),
        ("targets", targets if isinstance(targets, str) else ", ".join(targets or [])),
        ("trained", f"{report['parameters']:,} values in {where}{frozen_text}; {bytes_text(report['bytes'])}"),
        ("full copies", ", ".join(report["modules_to_save"])),
        ("new tokens", str(report["new_tokens"] or "")),
        ("merges", merges),
        ("PEFT", f"reads it as {report['peft_type']}" if report["peft_type"] else "does not read it"),
    ]


def _module_lines(rows: Sequence[Mapping[str, Any]], with_ranks: bool) -> list[str]:
    wide = max(len("module"), *(len(row["module"]) for row in rows))
    lines = [f"{'module':<{wide}}  layers  mean norm  largest norm" + ("  effective rank" if with_ranks else "")]
    for row in rows:
        line = f"{row['module']:<{wide}}  {row['layers']:>6}  {row['norm']:>9.3g}  {row['most']:>12.3g}"
        lines.append(line + (f"  {_rank(row):>14}" if with_ranks else ""))
    return lines


def _layer_lines(title: str, rows: Sequence[Mapping[str, Any]], with_ranks: bool, width: int) -> list[str]:
    room = max(20, width - 12 - (16 if with_ranks else 0))
    wide = min(room, max(len(title), *(len(row["layer"]) for row in rows)))
    lines = [f"{title:<{wide}}  {'norm':>9}" + ("  effective rank" if with_ranks else "")]
    for row in rows:
        name = row["layer"] if len(row["layer"]) <= wide else "…" + row["layer"][1 - wide :]
        lines.append(f"{name:<{wide}}  {row['norm']:>9.3g}" + (f"  {_rank(row):>14}" if with_ranks else ""))
    return lines


def _rank(row: Mapping[str, Any]) -> str:
    return "-" if row["effective_rank"] is None else f"{row['effective_rank']:.1f} of {row['rank']}"
