"""The first state is the method's own start, and is there again after whatever was trained."""

from __future__ import annotations

from pathlib import Path

import torch

import dist_subspace as dsub
from dist_subspace.rate_search.bench import Tried
from dist_subspace.rate_search.held import hold, put_back
from tests.rate_search.searches import OTHER, STEPS, bench_of, configuration


def test_the_first_state_is_what_attach_draws_and_is_put_back_bit_for_bit(home: Path) -> None:
    bench = bench_of(configuration(home, "never"), home / "search-held")
    fresh = dsub.attach(dsub.load_frozen(home / "model", "fp32"), dsub.SubspaceConfig(rank=2, dropout=0.1, seed=0))
    drawn = {name: parameter for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert {f"{name}.master" for name in drawn} == bench.first.tensors.keys(), "no moment is kept: they begin at zero"
    assert all(torch.equal(drawn[name], bench.first.tensors[f"{name}.master"]) for name in drawn)
    bench.train(Tried(OTHER), STEPS)
    put_back(bench.first, bench.engine, bench.model, 0, STEPS)
    again = hold(bench.engine, bench.model)
    assert again.optimizer_steps == bench.first.optimizer_steps == 0 and again.scaler == bench.first.scaler
    for name, tensor in again.tensors.items():
        expected = bench.first.tensors.get(name, torch.zeros_like(tensor))
        assert torch.equal(tensor, expected), name
    trained = dict(bench.model.named_parameters())
    assert all(torch.equal(trained[name], drawn[name]) for name in drawn), "what a forward reads"
