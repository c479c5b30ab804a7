"""What a user may ask for, and what is said when it cannot be."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest

from dist_subspace import methods
from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve


def test_unset_values_are_the_methods_own() -> None:
    resolved = resolve(SubspaceConfig())
    assert (resolved.settings.rank, resolved.settings.alpha, resolved.settings.dropout) == (16, 32.0, 0.0)
    assert resolved.targets == "all-linear" and resolved.unused == ()
    assert resolve(SubspaceConfig(rank=4)).settings.alpha == 8.0


PENALTY = {"power": 2, "reduction": "mean"}
BETWEEN = {"activation": "relu"}
PHASES = {"warmup_steps": None, "final_steps": None, "interval": None}
LORA = {**PENALTY, **BETWEEN, "init": "kaiming", "iterations": 1, "lr_ratio": 1.0}
FOLDED = {**PENALTY, "residual": "stacked"}
COUNT = {"num_virtual_tokens": 20}
# What every option is where nobody gives it, written down once by hand (docs/methods.md, "Defaults of a method").
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {**PENALTY, **BETWEEN, **PHASES, "power": 1, "init_rank": None, "beta1": 0.85, "beta2": 0.85},
    "bitfit": {"biases": "auto"},
    "dora": {**PENALTY, "differentiate_norm": False},
    "flexlora": {**PENALTY, **BETWEEN, **PHASES, "power": 1, "max_rank": None, "budget": 4},
    "flora": {**PENALTY, **BETWEEN},
    "houlsby": {"activation": "swish", "train_norms": False},
    "ia3": {"scale_bias": False, "input_scaled_modules": ()},
    "liera": {**PENALTY, "form": "first-order"},
    "lora": LORA,
    "lora-dash": {**PENALTY, "directions": 8, "warmup_steps": None},
    "lora-fa": {**BETWEEN, "corrected_gradient": False},
    "lora-xs": {"init": "zero"},
    "milora": {**FOLDED, "iterations": 1, "svd": "exact"},
    "miss": {"mini_r": None},
    "moslora": {**PENALTY, **BETWEEN, "mixer": "kaiming"},
    "oft": {"oft_block_size": 32, "block_share": False, "cayley": "neumann", "neumann_terms": 5},
    "olora": FOLDED,
    "p-tuning": {**COUNT, "encoder": "mlp", "hidden": None, "placement": None},
    "parallel-adapter": {**PENALTY, "scale": 1.0, "learned_scale": False},
    "pfeiffer": {"activation": "relu"},
    "pissa": {**FOLDED, "iterations": 1, "svd": "randomized"},
    "prefix": {**COUNT, "init": "normal", "projection": False, "projection_dim": 512},
    "prompt": {**COUNT, "init": "vocab", "init_text": None, "init_ids": (), "placement": None},
    "rslora": LORA,
    "sam-parser": {"top_k": None},
    "spectral-additive": {},
    "spectral-rotational": {"gain": False},
    "ssb": {"scale_bias": False},
    "ssl": {},
    "svdiff": {"top_k": None, "strength": 1.0},
    "trilora": {**PENALTY, **BETWEEN, "scale": "alpha/r"},
    "vera": {"d_init": 0.1, "projection_seed": 0, "save_projection": True},
}


def test_options_that_are_not_given_are_these() -> None:
    for method, info in methods().items():
        found = {name: option.default for name, option in info.options.items()}
        assert found == OPTIONS[method], method
    of_peft, own = peft.AdaLoraConfig(total_step=1), OPTIONS["adalora"]
    assert (own["beta1"], own["beta2"]) == (of_peft.beta1, of_peft.beta2)
    projections = peft.VeraConfig()
    peft_defaults = (projections.d_initial, projections.projection_prng_key, projections.save_projection)
    assert tuple(OPTIONS["vera"].values()) == peft_defaults
    config = SubspaceConfig()
    assert (config.method, config.constraint_weight, config.seed) == ("lora", 0.1, 0)
    assert {name for name, info in methods().items() if info.constraint != "none"} == {"adalora", "flexlora"}


def test_what_a_method_has_not_is_accepted_and_said_to_be_unused() -> None:
    resolved = resolve(SubspaceConfig(method="ssl", rank=8, alpha=16, dropout=0.1))
    assert resolved.unused == ("rank", "alpha", "dropout")
    assert (resolved.settings.rank, resolved.settings.dropout) == (0, 0.0)
    assert resolve(SubspaceConfig(method="ssb")).unused == ()
    patterns = SubspaceConfig(method="ssl", rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 2.0})
    assert resolve(patterns).unused == ("rank_pattern", "alpha_pattern")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "lorra"}, r"subspace\.method is 'lorra' \(did you mean 'lora'\?\); accepted: .*ssl"),
        ({"rank": 0}, r"subspace\.rank is 0; accepted: a whole number of at least 1"),
        ({"rank": -3}, r"subspace\.rank is -3; accepted"),
        ({"rank": 2.5}, r"subspace\.rank is 2\.5; accepted: a whole number"),
        ({"rank": True}, r"subspace\.rank is True; accepted: a whole number"),
        ({"alpha": "big"}, r"subspace\.alpha is 'big'; accepted: a number"),
        ({"alpha": float("nan")}, r"subspace\.alpha is nan; accepted: a number"),
        ({"dropout": 1.0}, r"subspace\.dropout is 1\.0; accepted: from 0 up to, but not including, 1"),
        ({"dropout": -0.1}, r"subspace\.dropout is -0\.1; accepted"),
        ({"constraint": "mpc"}, r"subspace\.constraint is 'mpc' \(did you mean 'mpc_o'\?\); accepted: none, mpc_o"),
        (
            {"method": "ssl", "constraint": "mpc_o"},
            r"subspace\.constraint is 'mpc_o', which method ssl cannot have: it has no pair of .*; accepted: none",
        ),
        (
            {"options": {"ini": 1}},
            r"an option of method lora is 'ini' \(did you mean 'init'\?\); accepted: power, .*init, .*lr_ratio",
        ),
        ({"constraint_weight": -1}, r"subspace\.constraint_weight is -1; accepted: a number of at least 0"),
        ({"constraint_weight": float("nan")}, r"subspace\.constraint_weight is nan; accepted"),
        ({"constraint_weight": "0.1"}, r"subspace\.constraint_weight is '0\.1'; accepted"),
        ({"options": {"init": "x"}}, r"subspace\.options\.init is 'x'; accepted: kaiming, gaussian"),
        ({"options": {"lr_ratio": 0}}, r"subspace\.options\.lr_ratio is 0; accepted: a number above 0"),
        ({"options": {"lr_ratio": "2"}}, r"subspace\.options\.lr_ratio is '2'; accepted: a number above 0"),
        ({"method": "ssl", "options": {"a": 1}}, r"subspace\.options has 'a', but method ssl has no options"),
        ({"method": "ssb", "options": {"scale_bias": 3}}, r"subspace\.options\.scale_bias is 3; accepted: False, True"),
        ({"target_modules": []}, r"subspace\.target_modules is empty; accepted: all-linear"),
        ({"target_modules": ""}, r"subspace\.target_modules is empty; accepted: all-linear"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_field_value_and_what_is_accepted(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(SubspaceConfig(**config))


def test_a_configuration_is_plain_json() -> None:
    config = SubspaceConfig(target_modules=("a", "b"), options={"lr_ratio": 2.0}, modules_to_save=("head",))
    again = SubspaceConfig(**json.loads(json.dumps(config.as_dict())))
    assert resolve(again).settings == resolve(config).settings and list(again.target_modules or ()) == ["a", "b"]
