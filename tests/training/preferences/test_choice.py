"""What goes with an objective: data, batch and dropout; the rest is refused before a weight is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_subspace.config import Config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.training.objective import Likelihood
from dist_subspace.training.preferences.choice import check_objective, make_objective, without_dropout
from dist_subspace.training.preferences.objectives import Dpo, Kto, Orpo

pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
FORMS = {"dpo": "preference", "kto": "unpaired-preference", "orpo": "chat-preference", "sft": "chat"}


def configuration(objective: str, *overrides: str) -> Config:
    data = {"train": "a.jsonl", "format": FORMS[objective]}
    return load_config({"model": {"path": "m"}, "data": data}, [f"training.objective={objective}", *overrides])


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        ("sft", "data.format=preference", "learns from samples alone; accepted with it: training.objective dpo or orpo"),
        ("sft", "data.format=unpaired-preference", "accepted with it: training.objective kto"),
        ("dpo", "data.format=alpaca", "'dpo' with data.format 'alpaca'; accepted with it: data.format preference or chat-"),
        ("kto", "data.format=preference", "accepted with it: data.format unpaired-preference or chat-unpaired-preference"),
        ("kto", "training.global_batch_size=1", "global_batch_size is 1 with training.objective 'kto'"),
        ("dpo", "subspace.dropout=0.1", "subspace.dropout is 0.1 with training.objective 'dpo', which trains without"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(objective: str, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_objective(configuration(objective, override))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_goes_together_is_made() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    kinds = {"sft": Likelihood, "dpo": Dpo, "kto": Kto, "orpo": Orpo}
    for objective, kind in kinds.items():
        check_objective(configuration(objective))
        assert type(make_objective(configuration(objective), torch.device("cpu"), model)) is kind
    check_objective(
        configuration("kto", "training.global_batch_size=1", "training.preference.loss_type=apo_zero_unpaired")
    )
    check_objective(configuration("dpo", "subspace.dropout=0.1", "training.preference.disable_dropout=false"))


def test_the_models_own_dropout_is_off_where_it_is_compared() -> None:
    for objective, override, expected in (
        ("sft", "training.seed=0", 0.5),
        ("dpo", "training.preference.disable_dropout=false", 0.5),
        ("dpo", "training.seed=0", 0.0),
    ):
        dropout = nn.Dropout(0.5)
        without_dropout(configuration(objective, override), nn.Sequential(dropout))
        assert dropout.p == expected
