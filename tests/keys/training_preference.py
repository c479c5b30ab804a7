"""`training.objective` and what it needs: the losses of TRL's own trainers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.keys.bench import UNSET, Bench
from tests.keys.preference_reference import assert_equal, pairs, preferring, trl_lines
from tests.keys.table import Key
from tests.tiny_models import tiny_model

_TRL = "TRL's own trainer with PEFT's LoRA, step by step"


def objective(bench: Bench) -> None:
    """Each of them; nothing has been learned at the first step of dpo."""
    pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
    for name in ("dpo", "kto", "orpo"):
        outcome = preferring(bench, name)
        assert_equal(outcome, trl_lines(bench, name))
        if name == "dpo":
            assert math.isclose(outcome.steps[0]["loss"], math.log(2), rel_tol=1e-6)


def as_trl(name: str, **preference: Any) -> Callable[[Bench], None]:
    """The run is TRL's with the same values, and not the one without them."""

    def check(bench: Bench) -> None:
        pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
        lines = trl_lines(bench, name, **preference)
        assert_equal(preferring(bench, name, **preference), lines)
        with pytest.raises(AssertionError):
            assert_equal(preferring(bench, name), lines)

    return check


def disable_dropout(bench: Bench) -> None:
    """Of a model with dropout of its own: without it nothing differs from the base before the first step."""
    pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
    size = {"vocab_size": len(bench.tokenizer), "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    folder = bench.save_model(tiny_model("GPT2LMHeadModel", **size), bench.folder / "dropping")
    changes = {
        "model.path": str(folder),
        "subspace.init_from": UNSET,
        "data.format": "preference",
        "data.train": bench.write("preference.jsonl", pairs()),
        "training.objective": "dpo",
        "training.max_steps": 1,
        "deepspeed.preset": "none",
    }
    first = [
        bench.run(changes | {"training.preference": {"disable_dropout": off}}).steps[0]["loss"] for off in (True, False)
    ]
    assert math.isclose(first[0], math.log(2), rel_tol=1e-6) and abs(first[1] - math.log(2)) > 1e-3


KEYS = [
    Key("training.objective", ("dpo", "kto", "orpo"), "the loss, and the figures of rewards", _TRL, objective),
    Key("training.preference.beta", (0.5,), "the loss and the rewards", _TRL, as_trl("dpo", beta=0.5)),
    Key("training.preference.loss_type", ("ipo",), "the loss", _TRL, as_trl("dpo", loss_type="ipo")),
    Key(
        "training.preference.label_smoothing",
        (0.2,),
        "the loss robust",
        _TRL,
        as_trl("dpo", loss_type="robust", label_smoothing=0.2),
    ),
    Key(
        "training.preference.desirable_weight",
        (2.0,),
        "the loss of desirable answers",
        _TRL,
        as_trl("kto", desirable_weight=2.0),
    ),
    Key(
        "training.preference.undesirable_weight",
        (0.5,),
        "the loss of undesirable answers",
        _TRL,
        as_trl("kto", undesirable_weight=0.5),
    ),
    Key(
        "training.preference.disable_dropout",
        (True, False),
        "the model's own dropout is off, or on",
        "the logarithm of 2, which dpo begins with where nothing differs",
        disable_dropout,
    ),
]
