"""What an objective takes beside its data, and what it refuses in one sentence."""

from __future__ import annotations

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError

BASE = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["beta=0.3"], "preference.beta is 0.3, which training.objective 'sft' does not use; accepted with it: "),
        (["objective=orpo", "label_smoothing=0.1"], "label_smoothing is 0.1, which training.objective 'orpo' does not"),
        (["objective=dpo", "desirable_weight=2"], "does not use; accepted with it: training.objective 'kto'"),
        (["objective=kto", "loss_type=ipo"], "loss_type is 'ipo' with training.objective 'kto'; accepted: kto, apo_zero"),
        (["objective=dpo", "label_smoothing=0.1"], "which loss_type 'sigmoid' does not use; accepted with it: loss_type robust"),
        (["objective=dpo", "loss_type=exo_pair"], "label_smoothing is 0.0, whose logarithm loss_type 'exo_pair' takes"),
        (["objective=dpo", "loss_type=aot"], "training.preference.loss_type is 'aot'"),
        (["objective=dpo", "beta=0"], "training.preference.beta is 0"),
        (["objective=ppo"], "training.objective is 'ppo'"),
    ],
)  # fmt: skip
def test_what_an_objective_does_not_use_is_refused(given: list[str], message: str) -> None:
    overrides = [f"training.{key}" if key.startswith("objective") else f"training.preference.{key}" for key in given]
    with pytest.raises(UsageError) as caught:
        load_config(BASE, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_that_are_written_out_are_no_use_of_them() -> None:
    written = load_config(BASE).model_dump(mode="json")
    assert load_config(written).training.objective == "sft"
    kto = load_config(BASE, ["training.objective=kto", "training.preference.undesirable_weight=0"])
    assert kto.training.preference.undesirable_weight == 0
