"""`python -m tests.docs_tables`: writes the tables of docs/reference.md and README.md that registries, the schema, the recipes
and the shapes of models decide."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference.md"
README = ROOT / "README.md"
SIDE = 4096  # of the matrix whose bytes are shown
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods_table() -> str:
    from dist_subspace import methods
    from dist_subspace.report.tables import CATEGORIES

    rows = []
    for category, meaning in CATEGORIES.items():
        rows.append((f"**{category}**: {meaning}", *[""] * 8))
        for info in methods().values():
            if info.category == category:
                rank = "-" if info.rank is None else str(info.rank)
                alpha = {None: "", 1.0: ", α = r"}.get(info.alpha_over_rank, f", α = {info.alpha_over_rank or 0:g} r")
                marks = " ".join(kind[-1] for kind in info.constraints) or "-"
                merges, own = "yes" if info.mergeable else "no", f"`{info.name}`"
                rows.append((own, info.count, rank + alpha, info.statistic, merges, marks, info.peft_type or "-"))
                rate = info.learning_rate
                rows[-1] += (
                    f"{rate.middle:g} to {rate.wide:g}",
                    f"[{info.reference}](https://arxiv.org/abs/{info.reference})",
                )
    header = ("method", "trained in a layer", "rank", "statistic", "merges", "MPC", "PEFT", "learning rate", "arXiv")
    return markdown(header, rows)


def options_table() -> str:
    from dist_subspace import methods
    from dist_subspace.report.tables import value_text
    from dist_subspace.subspace.core.constraints import constraint_options

    rows = [
        (f"`{info.name}`", f"`{name}`", f"`{value_text(option.default)}`", _plain(option.accepted), option.help)
        for info in methods().values()
        for name, option in info.options.items()
        if name not in constraint_options(info.constraints)
    ]
    return markdown(("method", "option", "default", "accepted", "meaning"), rows)


def storages_table() -> str:
    from dist_subspace.report.tables import value_text
    from dist_subspace.storage import storages

    rows = []
    for info in storages().values():
        options = ", ".join(f"`{name}` ({value_text(option.default)})" for name, option in info.options.items())
        held = info.bytes_held(SIDE, SIDE, **info.checked({}))
        rows.append((f"`{info.name}`", str(info.bits), f"{held:,}", options or "-", info.help))
    return markdown(("storage", "bits a weight", "bytes", "options (default)", "meaning"), rows)


def presets_table() -> str:
    from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config

    rows = [("`none`", "-", "-", "-", "torch alone")]
    for name, stage in PRESETS.items():
        numbers = {"micro_batch": 1, "rounds": 1, "world_size": 1, "max_grad_norm": 1.0}
        zero = deepspeed_config(name, **numbers, nvme_path="/nvme", ranks_per_node=8)["zero_optimization"]  # type: ignore[arg-type]
        places = [zero.get(key, {}).get("device", "-") for key in ("offload_optimizer", "offload_param")]
        rows.append((f"`{name}`", str(stage), *places, "DeepSpeed"))
    return markdown(("preset", "ZeRO stage", "optimizer offloaded to", "frozen weights offloaded to", "engine"), rows)


def keys_table() -> str:
    from dist_subspace.config.schema import Config
    from dist_subspace.report.keys import REQUIRED, key_facts

    rows = [
        (f"`{key.name}`", key.accepted, key.default if key.default == REQUIRED else f"`{key.default}`", key.meaning)
        for key in key_facts(Config.model_json_schema(mode="validation"), quote="`")
    ]
    return markdown(("key", "accepted", "default", "meaning"), rows)


def _plain(accepted: str) -> str:
    """As YAML has it."""
    return ", ".join({"True": "true", "False": "false"}.get(word, word) for word in accepted.split(", "))


def recipes_table() -> str:
    """From the headers, which tests/config/test_recipes.py compares with what it computes."""
    from tests.config.headers import RECIPES, header

    rows = []
    for path in sorted(RECIPES, key=_weight):
        said, config = header(path), yaml.safe_load(path.read_text(encoding="utf-8"))
        model, method, rank = config["model"], config["subspace"]["method"], config["subspace"].get("rank")
        what = f"{method}{f' {rank}' if rank else ''}, {model['storage']}, {config['deepspeed']['preset']}"
        link = f"[{path.stem}](configs/{path.name})"
        held = said["Bytes a rank"].replace(" adapter and its optimizer state", " adapter")
        hardware = said["Hardware"].replace("one node with ", "").replace("one ", "1 ")
        rows.append((link, hardware, what, f"{config['data']['max_length']:,}", held))
    header_row = (
        "recipe",
        "hardware",
        "method, storage, preset",
        "tokens a row",
        "a rank holds (the adapter with its optimizer state)",
    )
    return markdown(header_row, rows)


def memory_table() -> str:
    """As the recipes' headers are computed."""
    from tests.config.memory import GPUS, memory_rows

    return markdown(("model", "storage", *(f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS)), memory_rows())


def _weight(path: Path) -> tuple[float, str]:
    """The smoke first, then by billions of weights in the name."""
    found = re.search(r"-(\d+)b\b", path.stem)
    return (float(found[1]) if found else -1.0 if "smoke" in path.stem else 0.4), path.stem


def markdown(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "options": options_table,
    "storages": storages_table,
    "presets": presets_table,
    "keys": keys_table,
    "recipes": recipes_table,
    "memory": memory_table,
}
ON_THE_README = ("recipes", "memory")


def page_of(name: str) -> Path:
    return README if name in ON_THE_README else PAGE


def filled(text: str) -> str:
    """The page with every generated table as it is now."""
    return _BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def shown(text: str) -> dict[str, str]:
    """The tables that the page has, by name."""
    return {block[2]: block[0].removeprefix(block[1]).removesuffix(block[3]) for block in _BLOCK.finditer(text)}


if __name__ == "__main__":
    for page in (PAGE, README):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
