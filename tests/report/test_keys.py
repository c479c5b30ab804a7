"""What the command line says about keys, and the recipe that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_subspace.config import config_schema, dump_config, load_config
from dist_subspace.config.schema import Config
from dist_subspace.errors import UsageError
from dist_subspace.report.keys import explained, key_facts, recipe_text


def test_a_key_is_explained_by_what_it_takes_its_default_and_its_meaning() -> None:
    rows = explained("data.truncation").splitlines()
    assert rows[0] == "data.truncation"
    assert [row.split(maxsplit=1) for row in rows[1:]] == [
        ["accepted", "turns, tokens"],
        ["default", "turns"],
        ["meaning", str(Config.model_fields["data"].annotation.model_fields["truncation"].description)],  # type: ignore[union-attr]
    ]
    assert explained("truncation") == explained("data.truncation"), "people forget the section"
    of_section = explained("deepspeed")
    assert all(f"deepspeed.{name}\n" in of_section for name in ("preset", "config", "nvme_path"))


def test_a_key_that_is_none_is_told_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"KEY is 'training\.lerning_rate', .* the nearest: training\.learning_rate"):
        explained("training.lerning_rate")


def test_the_recipe_is_a_configuration_whose_every_key_is_at_its_default(tmp_path: Path) -> None:
    text = recipe_text()
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    given = yaml.safe_load(text)
    assert {section: keys for section, keys in given.items() if keys} == {
        "model": {"path": "meta-llama/Llama-3.1-8B"},
        "data": {"train": "train.jsonl"},
    }
    plain = load_config({"model": given["model"], "data": given["data"], "run": {"output_dir": "runs/recipe"}})
    assert load_config(file) == plain
    file.write_text("\n".join(line.replace("  # ", "  ", 1) if ": " in line else line for line in _keys_only(text)))
    assert yaml.safe_load(dump_config(load_config(file))) == yaml.safe_load(dump_config(plain)), "what is commented out"
    names = {key.name for key in key_facts(config_schema()) if key.name.count(".") == 1}
    assert {
        f"{section}.{key}" for section, keys in yaml.safe_load(file.read_text()).items() for key in keys
    } >= names - {
        "training.warmup_ratio",
        "training.max_steps",
    }


def _keys_only(text: str) -> list[str]:
    """The lines of keys, less those that exclude one another."""
    names = {key.name.partition(".")[2] for key in key_facts(config_schema())}
    kept = []
    for line in text.splitlines():
        name = line.replace("  # ", "  ", 1).partition(":")[0].strip()
        if (not line.startswith(" ") and line.endswith(":")) or (
            line.startswith("  ") and name in names - {"warmup_ratio", "output_dir"}
        ):
            kept.append(line)
    return [*kept, "  output_dir: runs/recipe"]
