"""Methods on the experts of every family that is tuned: the table of `experts_table.py`, a sample of it by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_subspace.families.experts import routers_among, stacks_of
from tests.families.experts_formula import FORMULAS
from tests.families.experts_table import FAMILIES, check, count, make, table
from tests.tiny_models import tiny_model

# Each family once and each method once or twice: neighbours in both lists come together.
SAMPLE = [(family, list(FORMULAS)[number % len(FORMULAS)]) for number, family in enumerate(FAMILIES)]
UNKNOWN = {"DBRX"}  # whose experts are no stack that is known


@pytest.mark.parametrize(("family", "method"), SAMPLE)
def test_a_method_on_a_familys_experts_computes_trains_and_merges_as_the_formula(
    family: str, method: str, tmp_path: Path
) -> None:
    make(family, tmp_path)
    row = check(family, method, tmp_path, "nf4" if method in ("dora", "pissa") else "fp32")
    assert row.verdict == "right" or (family in UNKNOWN and row.verdict == "refused"), str(row)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_method_on_any_familys_experts_is_wrong() -> None:
    rows = table(list(FAMILIES), list(FORMULAS))
    print(count(rows))
    assert not [str(row) for row in rows if row.verdict.startswith("wrong")]
    assert {row.family for row in rows if row.refused} <= UNKNOWN


def test_routers_are_told_by_their_names_where_there_are_experts() -> None:
    mixture = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", num_local_experts=4, num_key_value_heads=2)
    names = [name for name, _ in mixture.named_parameters()]
    assert routers_among(mixture, names) == [f"model.layers.{n}.mlp.gate.weight" for n in range(2)]
    dense = tiny_model("LlamaForCausalLM")
    assert not routers_among(dense, [*names, "model.layers.0.gate"])
    assert stacks_of(mixture.model.layers[0].mlp.experts) is not None and stacks_of(dense) is None
