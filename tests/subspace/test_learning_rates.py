"""The rate that a configuration trains at: every method has one, and what it is multiplied by changes it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, methods, suggested_rate

MINILM, SEVEN_BILLION = 384, 4096


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_rate_that_falls_with_the_width(name: str) -> None:
    narrow, middle, wide = (suggested_rate(SubspaceConfig(method=name), width) for width in (64, MINILM, SEVEN_BILLION))
    assert 1 > narrow.rate >= middle.rate > wide.rate > 1e-6
    assert not middle.is_far(middle.rate) and middle.is_far(11 * middle.rate) and middle.is_far(middle.rate / 11)
    assert f"method {name} for 384 inputs" in middle.why and "measured" in middle.why
    assert methods()[name].learning_rate.source in wide.why


CHANGED: list[tuple[str, dict[str, Any], float]] = [
    ("lora", {"rank": 64, "alpha": 32}, 1),  # γ falls as the rank rises
    ("lora", {"alpha": 128}, 1 / 2),
    ("lora", {"rank": 64}, 1 / 2),  # α is twice the rank
    ("lora", {"options": {"lr_ratio": 16}}, 1 / 4),
    ("rslora", {"rank": 64, "alpha": 32}, 0.5**0.5),  # γ = α / √r
    ("pissa", {"rank": 8, "alpha": 64}, 1 / 2),
    ("adalora", {"rank": 16}, 0.5**0.5),
    ("trilora", {"rank": 8, "options": {"scale": 1}}, 2),  # γ is 1 in the place of 2
    ("parallel-adapter", {"options": {"scale": 4.0}}, 1 / 2),
    ("svdiff", {"options": {"strength": 2.0}}, 1 / 2),
    ("svdiff", {"options": {"strength": 0.0}}, 1),
    ("vera", {"options": {"d_init": 0.2}}, 1 / 2),
    ("ssb", {"rank": 64, "alpha": 8}, 1),  # which it has no use for
    ("lora", {"constraint": "mpc_o"}, 1),
]


@pytest.mark.parametrize("method, settings, times", CHANGED, ids=str)
def test_what_multiplies_the_update_divides_the_rate(method: str, settings: dict[str, Any], times: float) -> None:
    own = suggested_rate(SubspaceConfig(method=method), MINILM)
    changed = suggested_rate(SubspaceConfig(method=method, **settings), MINILM)
    assert changed.rate == pytest.approx(own.rate * times, rel=0.05)  # two digits are kept
    assert ("is not its own" in changed.why) == (not math.isclose(times, 1))


def test_a_method_that_does_not_exist_has_none() -> None:
    with pytest.raises(UsageError, match="lroa"):
        suggested_rate(SubspaceConfig(method="lroa"), MINILM)
