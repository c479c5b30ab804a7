"""`methods`: every method in one table at every width, and everything of it as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_subspace import methods
from dist_subspace.cli import main
from dist_subspace.report.tables import CATEGORIES, method_text, methods_table, methods_text

FOUND = methods()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 100, 120, 160, 200])
def test_no_line_is_wider_than_the_terminal_and_every_fact_is_there(width: int) -> None:
    text = methods_text(FOUND, width)
    assert all(len(line) <= max(width, 80) for line in text.splitlines())
    lines = text.splitlines()
    for name, info in FOUND.items():
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert info.reference in row and info.statistic in row
        assert row.split(info.statistic, 1)[1].split()[0] == ("yes" if info.mergeable else "no")
        assert info.count.split()[0] in row
    assert [line for line in lines if line.startswith(tuple(CATEGORIES))] == [
        f"{c}: {m}" for c, m in CATEGORIES.items()
    ]


def test_every_method_stands_below_its_category() -> None:
    lines = methods_text(FOUND, 160).splitlines()
    place = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith(tuple(CATEGORIES))}
    for name, info in FOUND.items():
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
        assert max((at, category) for category, at in place.items() if at < number)[1] == info.category


def test_settings_and_constraints_are_shown_with_their_defaults() -> None:
    lora = next(line for line in methods_text(FOUND, 200).splitlines() if line.startswith("lora "))
    assert "learning_rate=0.003 to 0.0002, rank=16, alpha=2r" in lora and " o d n " in lora
    adalora = next(line for line in methods_text(FOUND, 200).splitlines() if line.startswith("adalora "))
    assert " o* d n " in adalora and "beta1=0.85" in methods_text(FOUND, 80)
    pissa = next(line for line in methods_text(FOUND, 200).splitlines() if line.startswith("pissa "))
    assert "rank=16, alpha=r" in pissa


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(printed(capsys, "--json"))}
    assert rows.keys() == FOUND.keys()
    for name, row in rows.items():
        info = FOUND[name]
        assert row["category"] == info.category in CATEGORIES
        assert row["mergeable"] == info.mergeable and row["statistic"] == info.statistic
        assert row["identity_at_the_start"] == info.identity and row["peft_type"] == info.peft_type
        for said in ("uses_rank", "uses_dropout", "rank", "alpha_over_rank", "constraint"):
            assert row[said] == getattr(info, said)
        assert (row["arxiv"], row["parameters_a_layer"]) == (info.reference, info.count)
        assert row["options"].keys() == info.options.keys()
        assert all(option["help"] and option["accepted"] for option in row["options"].values())
        assert set(row["constraints"]) | set(row["constraint_refusals"]) == {"mpc_o", "mpc_d", "mpc_n"}
        assert all(row["constraint_refusals"].values())
        assert row["learning_rates"]["384"] == info.learning_rate.middle and row["learning_rate_source"]
    assert len(methods_table(FOUND)) == len(FOUND)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_one_method_has_a_card(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, name)
    assert FOUND[name].reference in text
    for option, described in FOUND[name].options.items():
        assert f"  {option}" in text and described.help.split()[0] in text
    assert all(len(line) <= 90 for line in method_text(FOUND[name], 90).splitlines())
    facts = {line[:13].strip(): line[15:] for line in text.partition("\noptions")[0].splitlines()}
    info = FOUND[name]
    assert facts["merges"] == ("yes" if info.mergeable else "no")
    assert facts["dropout"] == ("on the method's own branch" if info.uses_dropout else "none")
    assert facts["PEFT"].endswith(info.peft_type or "does not read its files") and facts["category"].startswith(
        info.category
    )
    assert ("rank" in facts) == info.uses_rank
    assert f"{info.learning_rate.middle:g} for 384" in facts["learning rate"]


def test_an_unknown_method_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "lorra"]) == 2
    assert "'lorra' (did you mean 'lora'?)" in capsys.readouterr().err
