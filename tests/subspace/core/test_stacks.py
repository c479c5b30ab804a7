"""A method on a stack of experts is the method on each expert as a linear layer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.notices import heard
from dist_subspace.statistics.rounds import ExpertWeights
from dist_subspace.storage import FrozenStack, pack, pack_stack
from dist_subspace.storage.stack import hit
from dist_subspace.subspace import (
    SetupStatistic,
    StackedPart,
    SubspaceConfig,
    SubspaceLinear,
    method_class,
    methods,
    resolve,
)
from tests.families.experts_formula import FORMULAS, changed, dense
from tests.tiny_models import tiny_inputs, tiny_model

EXPERTS, D_OUT, D_IN = 4, 12, 10
COUNTS = (3, 0, 2, 1)
ABLE = sorted(name for name, info in methods().items() if info.on_experts)
SHARING = sorted(name for name, info in methods().items() if "shared" in info.on_experts)
OPTIONS: dict[str, dict[str, Any]] = {
    "miss": {"rank": 3},
    "lora": {"rank": 2, "dropout": 0.5},
    "rslora": {"rank": 2},
    "dora": {"rank": 2, "alpha": 5.0, "dropout": 0.5},
    "pissa": {"rank": 2, "alpha": 5.0, "dropout": 0.5, "options": {"svd": "exact"}},
}

each_method = pytest.mark.parametrize("method", ABLE)


def weights() -> Tensor:
    return torch.randn(EXPERTS, D_OUT, D_IN, generator=torch.Generator().manual_seed(0))


class ExpertWeightsOf(ExpertWeights):
    """With originals that no file holds."""

    def __init__(self, stack: FrozenStack) -> None:
        super().__init__(stack, 0, "stack")
        self._originals = weights


def settled(method: str, stack: FrozenStack, **config: Any) -> StackedPart:
    """A part on a stack, which has its statistic."""
    given = OPTIONS.get(method, {}) | {"target_parameters": ["experts"]} | config
    resolved = resolve(SubspaceConfig(method=method, **given))
    part = StackedPart(stack, resolved.method, resolved.settings, torch.Generator().manual_seed(1))
    if part.setup_statistic != "none":
        with torch.no_grad():
            part.set_factors(part.decompose(ExpertWeightsOf(stack)))
    return part


def stacked(method: str, storage: str, **config: Any) -> tuple[StackedPart, list[SubspaceLinear]]:
    """A part on a stack with random values in it, and the same on each expert as a linear layer of its own."""
    stack = pack_stack(weights(), storage)
    part = settled(method, stack, **config)
    with torch.no_grad():
        for parameter in part.trainables().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    alone = []
    for number, weight in enumerate(weights()):
        one = method_class(method).build(pack(weight, storage), part.settings, torch.Generator())
        assert isinstance(one, SubspaceLinear)
        if isinstance(one, SetupStatistic) and one.setup_statistic != "none":
            one.set_factors(one.decompose(ExpertWeightsOf(stack)[number]))
        for name, parameter in one.trainables().items():
            parameter.data.copy_(part.trainables()[name].data if part.shared else part.trainables()[name].data[number])
        alone.append(one)
    return part, alone


def by_expert(alone: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([alone[number](x[rows]) for number, rows in hit(COUNTS)])


def test_these_methods_can_be_put_on_experts() -> None:
    assert ABLE == ["dora", "ia3", "lora", "miss", "pissa", "rslora", "ssb", "ssl"]
    assert SHARING == ["ia3", "lora", "miss", "rslora", "ssb", "ssl"] and set(FORMULAS) == set(ABLE)


@each_method
@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_outputs_and_gradients_are_those_of_each_expert_alone(method: str, storage: str) -> None:
    part, alone = stacked(method, storage)
    part.eval()
    rows = torch.randn(sum(COUNTS), D_IN)
    g = torch.randn(sum(COUNTS), D_OUT)
    x, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    y, expected = part(x, COUNTS), by_expert([one.eval() for one in alone], other)
    torch.testing.assert_close(y, expected)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, other.grad)
    for name, parameter in part.trainables().items():
        own = [one.trainables()[name].grad for one in alone]
        assert parameter.grad is not None and own[1] is None
        gradients = [torch.zeros_like(parameter[0]) if grad is None else grad for grad in own]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients))


@each_method
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_outputs_and_gradients_are_those_of_the_formula(method: str, storage: str) -> None:
    part, _ = stacked(method, storage)
    rows, g = torch.randn(sum(COUNTS), D_IN), torch.randn(sum(COUNTS), D_OUT)
    x, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    y = part.eval()(x, COUNTS)
    matrices, leaves = changed(part)
    right = torch.cat([other[rows] @ matrices[number].t() for number, rows in hit(COUNTS)])
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
    y.backward(g)
    right.backward(g)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in part.trainables().items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", SHARING)
def test_experts_that_share_have_one_set_of_parameters_and_its_gradient_is_their_sum(method: str) -> None:
    part, alone = stacked(method, "nf4", expert_parameters="shared")
    part.eval()
    x, g = torch.randn(sum(COUNTS), D_IN), torch.randn(sum(COUNTS), D_OUT)
    y, expected = part(x, COUNTS), by_expert([one.eval() for one in alone], x)
    torch.testing.assert_close(y, expected)
    y.backward(g)
    expected.backward(g)
    for name, parameter in part.trainables().items():
        own = [one.trainables()[name].grad for one in alone]
        assert parameter.shape == alone[0].trainables()[name].shape
        torch.testing.assert_close(parameter.grad, torch.stack([grad for grad in own if grad is not None]).sum(0))
    for number, one in enumerate(alone):
        torch.testing.assert_close(part.merged(number, weights()[number]), one.merged(weights()[number]))
    with torch.no_grad():
        other = settled(method, cast(FrozenStack, part.base), expert_parameters="shared")
        other.load_file_tensors(part.file_tensors())
    assert {name: t.shape for name, t in part.file_tensors().items()} == {
        name: t.shape for name, t in alone[0].file_tensors().items()
    }
    torch.testing.assert_close(other.eval()(x, COUNTS), y)


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_pissa_starts_at_each_experts_own_largest_triplets(storage: str, residual: str) -> None:
    stack = pack_stack(weights(), storage, transposed=False)
    before = dense(stack)
    options = {"svd": "exact", "residual": residual}
    part = settled("pissa", stack, options=options).eval()
    if part.rebases:
        matrices = part.rebased(part.factor_tensors(), ExpertWeightsOf(stack))
        part.base = stack.repacked(matrices)
    u, s, v = torch.linalg.svd(weights() if part.rebases else before, full_matrices=False)
    largest = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
    gamma = part.settings.alpha / part.settings.rank
    a, b = part.get_parameter("lora_A"), part.get_parameter("lora_B")
    torch.testing.assert_close(gamma * (b @ a), largest, rtol=1e-4, atol=1e-4)
    x = torch.randn(sum(COUNTS), D_IN)
    kept = dense(cast(FrozenStack, part.base))
    rest = torch.cat([x[rows] @ (kept[n] + (largest[n] if part.rebases else 0)).t() for n, rows in hit(COUNTS)])
    torch.testing.assert_close(part(x, COUNTS), rest, rtol=1e-4, atol=1e-4)
    part.enabled = False
    torch.testing.assert_close(part(x, COUNTS), rest, rtol=1e-4, atol=1e-4)


@each_method
def test_an_expert_merges_and_is_written_as_it_is_alone(method: str) -> None:
    part, alone = stacked(method, "fp32")
    for number, one in enumerate(alone):
        torch.testing.assert_close(part.merged(number, weights()[number]), one.merged(weights()[number]))
    with torch.no_grad():
        tensors = part.file_tensors()
        for suffix, tensor in tensors.items():
            assert torch.equal(tensor, torch.stack([one.file_tensors()[suffix] for one in alone]))
        other = settled(method, cast(FrozenStack, part.base))
        other.load_file_tensors(tensors)
    for name, parameter in part.trainables().items():
        torch.testing.assert_close(other.trainables()[name], parameter, rtol=1e-6, atol=1e-7)


@each_method
def test_a_disabled_part_computes_what_the_frozen_experts_do(method: str) -> None:
    part, _ = stacked(method, "nf4")
    x = torch.randn(sum(COUNTS), D_IN)
    assert not torch.allclose(part.eval()(x, COUNTS), part.base(x, COUNTS))
    part.enabled = False
    assert torch.equal(part(x, COUNTS), part.base(x, COUNTS))


def test_every_expert_begins_with_its_own_draw_and_none_changes_the_model() -> None:
    resolved = resolve(SubspaceConfig(method="lora", rank=2))
    part = StackedPart(
        pack_stack(weights(), "fp32"), resolved.method, resolved.settings, torch.Generator().manual_seed(1)
    )
    drawn = part.get_parameter("lora_A")
    assert drawn.shape == (EXPERTS, 2, D_IN) and not torch.equal(drawn[0], drawn[1])
    x = torch.randn(sum(COUNTS), D_IN)
    assert torch.equal(part(x, COUNTS), part.base(x, COUNTS))
    assert [name for name, _ in part.named_modules()] == ["", "base"]


def test_dropout_is_drawn_in_training_alone() -> None:
    part, _ = stacked("lora", "fp32")
    x = torch.randn(sum(COUNTS), D_IN)
    assert not torch.equal(part.train()(x, COUNTS), part(x, COUNTS))
    assert torch.equal(part.eval()(x, COUNTS), part(x, COUNTS))


# On a model.


def mixtral(**changes: Any) -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes | changes)


def test_named_stacks_alone_are_targets_and_beside_named_modules_both_are() -> None:
    model = dsub.attach(mixtral(), SubspaceConfig(method="lora", rank=2, target_parameters=["experts.down_proj"]))
    assert set(model.subspace.layers) == {f"model.layers.{n}.mlp.experts.down_proj" for n in range(2)}
    both = dsub.attach(
        mixtral(), SubspaceConfig(method="lora", target_modules=["q_proj"], target_parameters=["gate_up_proj"], rank=2)
    )
    kinds = {name.rpartition(".")[2]: type(both.get_submodule(name)) for name in both.subspace.layers}
    assert kinds == {"q_proj": method_class("lora"), "gate_up_proj": StackedPart}
    assert isinstance(both.model.layers[0].mlp.experts.gate_up_proj.base, FrozenStack)
    assert isinstance(both.model.layers[0].mlp.experts.down_proj, nn.Parameter)


def test_all_linear_leaves_experts_out_and_says_so() -> None:
    told: list[str] = []
    with heard(told.append):
        model = dsub.attach(mixtral(), SubspaceConfig(method="lora", rank=2))
    assert not [name for name in model.subspace.layers if "experts" in name or "gate" in name]
    (said,) = [sentence for sentence in told if "experts" in sentence]
    assert said.startswith("left out of all-linear: model.layers.0.mlp.experts.gate_up_proj and 1 like it, ")
    assert said.endswith("subspace.target_parameters")
    told.clear()
    with heard(told.append):
        names = ["experts.gate_up_proj", "experts.down_proj"]
        dsub.attach(
            mixtral(), SubspaceConfig(method="lora", target_modules="all-linear", target_parameters=names, rank=2)
        )
    assert not [sentence for sentence in told if "experts" in sentence]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"method": "oft"},
            "on which method oft cannot be put; accepted: a method of dora, ia3, lora, miss, pissa, rslora, ssb, ssl",
        ),
        ({"method": "prompt"}, "on which method prompt cannot be put"),
        (
            {"method": "dora", "expert_parameters": "shared"},
            "subspace.expert_parameters is 'shared', but .* dora start at its own matrix; accepted: own, or a method of ia3",
        ),
        ({"method": "pissa", "expert_parameters": "shared"}, "method pissa start at its own matrix"),
        ({"expert_parameters": "none"}, "subspace.expert_parameters is .none.; accepted: own, shared"),
        ({"expert_parameters": "shared", "target_parameters": []}, "but no experts are named; accepted: own, or with"),
        ({"constraint": "mpc_o"}, "subspace.constraint cannot be had on experts"),
        ({"options": {"init": "loftq"}}, "subspace.options.init loftq cannot be had on experts"),
        ({"method": "ssb", "options": {"scale_bias": True}}, "subspace.options.scale_bias cannot be had on experts"),
        (
            {"target_parameters": ["q_proj"]},
            "has 'q_proj', which names no stack of experts; those of this model end in: gate_up_proj, down_proj",
        ),
        ({"rank": 40}, "rank is 40, but model.layers.0.mlp.experts.* accepted: at most 32"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_changed(config: dict[str, Any], sentence: str) -> None:
    model = mixtral()
    given = {"target_parameters": ["experts.down_proj"]} | config
    with pytest.raises(UsageError, match=sentence):
        dsub.attach(model, SubspaceConfig(**given))
    assert dsub.subspace.attachment(model) is None


def test_vectors_of_experts_have_no_weight_decay() -> None:
    names = {"target_parameters": ["experts.down_proj"]}
    vectors = dsub.attach(mixtral(), SubspaceConfig(method="ssl", **names))
    assert {group["weight_decay"] for group in dsub.parameter_groups(vectors, 1e-3, 0.1)} == {0.0}
    matrices = dsub.attach(mixtral(), SubspaceConfig(method="lora", rank=2, options={"lr_ratio": 4.0}, **names))
    shared = SubspaceConfig(method="ssl", expert_parameters="shared", **names)
    assert dsub.parameter_groups(dsub.attach(mixtral(), shared), 1e-3, 0.1)[0]["weight_decay"] == 0.0
    shared = SubspaceConfig(method="lora", rank=2, expert_parameters="shared", **names)
    assert dsub.parameter_groups(dsub.attach(mixtral(), shared), 1e-3, 0.1)[0]["weight_decay"] == 0.1
    groups = dsub.parameter_groups(matrices, 1e-3, 0.1)
    assert {(group["weight_decay"], group["lr"]) for group in groups} == {(0.1, 1e-3), (0.1, 4e-3)}


@each_method
def test_a_model_with_a_method_on_its_experts_trains_only_those(method: str) -> None:
    model = dsub.attach(
        mixtral(),
        SubspaceConfig(method=method, target_parameters=["gate_up_proj", "down_proj"], **OPTIONS.get(method, {})),
    )
    model.train()
    loss = model(**tiny_inputs(model, labels=True)).loss
    loss.backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".experts." in name for name in names)
    assert all(p.grad is not None and p.grad.any() for p in dsub.trainable_parameters(model)) or method in (
        "lora",
        "rslora",
        "dora",
    )
