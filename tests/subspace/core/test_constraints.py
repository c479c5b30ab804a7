"""MPC: the values and gradients of docs/methods.md, "Matrix pattern constraints", injected once a step, in the training loss
alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, disabled
from dist_subspace.subspace.attach import attached
from dist_subspace.subspace.core.accumulation import Accumulation
from dist_subspace.subspace.core.constraints import Constraint, Penalties, Penalty, penalty_value
from tests.matrix.tiny import global_batch
from tests.subspace.golden import A, B, dense_penalty
from tests.tiny_models import odd_model, tiny_config, tiny_model


def penalty(kind: str, power: int = 2, reduction: str = "mean") -> Penalty:
    """The one layer's penalty at weight 1."""
    return Penalty("layer", Penalties(Constraint(kind, 1.0, power, reduction), Accumulation(), matrices=2, layers=1))


@pytest.mark.parametrize(("kind", "value"), [("mpc_o", 47.0), ("mpc_d", 30.0)])
def test_the_penalty_is_the_papers(kind: str, value: float) -> None:
    assert float(penalty_value(A, B, Constraint(kind, 1.0))) == pytest.approx(value)


def test_power_one_is_the_mean_over_factor_matrices_of_the_norms() -> None:
    one = penalty("mpc_o", power=1)
    one.gradients(A, B)
    assert one.penalties.total() == pytest.approx(4.8252007828)


def test_gradients_are_the_golden_ones() -> None:
    grad_a, grad_o = penalty("mpc_o").gradients(A, B)
    torch.testing.assert_close(grad_a, torch.tensor([[20.0, -4, -24, 40], [-4, 4, 8, -8]]))
    torch.testing.assert_close(grad_o, torch.tensor([[4.0, -4], [-8, 32], [-8, 20]]))
    _, grad_d = penalty("mpc_d").gradients(A, B)
    torch.testing.assert_close(grad_d, torch.tensor([[0.0, -4], [-8, 0], [-4, 4]]))


@pytest.mark.parametrize("kind", ["mpc_o", "mpc_d"])
@pytest.mark.parametrize("power", [1, 2])
def test_gradients_are_autograds_of_the_value(kind: str, power: int) -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    off = (b.t() @ b) - (torch.diag((b.t() @ b).diagonal()) if kind == "mpc_d" else torch.eye(2))
    terms = [(a @ a.t() - torch.eye(2)).square().sum(), off.square().sum()]
    value = sum(terms) if power == 2 else sum(t.sqrt() for t in terms) / 2
    expected = torch.autograd.grad(value, (a, b))
    for actual, wanted in zip(penalty(kind, power).gradients(A, B), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_norm_of_zero_has_gradient_zero() -> None:
    one = penalty("mpc_o", power=1)
    for gradient in one.gradients(torch.eye(2, 4), torch.eye(3, 2)):
        assert not gradient.any()


def constrained_model(method: str = "lora", kind: str = "mpc_o", **options: object) -> nn.Module:
    model = odd_model("llama")
    attach(model, SubspaceConfig(method=method, rank=2, constraint=kind, constraint_weight=0.5, options=options))
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def expected_gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """Of the mean loss plus the penalty, once."""
    names, parameters = zip(*trained(model).items(), strict=True)
    constraint = attached(model).settings.constraint
    assert constraint is not None
    task = torch.autograd.grad(sum(losses) / len(losses), parameters, allow_unused=True)
    extra = torch.autograd.grad(dense_penalty(model, constraint), parameters, allow_unused=True)
    zero = [torch.zeros_like(p) for p in parameters]
    both = zip(task, extra, zero, strict=True)
    return {n: (z if t is None else t) + (z if e is None else e) for n, (t, e, z) in zip(names, both, strict=True)}


def task_loss(model: nn.Module, step: int) -> Tensor:
    """The loss without the penalty: the model in evaluation mode draws nothing here, so it is the same function."""
    model.eval()
    ids = global_batch(step)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.train()
    return loss


@pytest.mark.parametrize("kind", ["mpc_o", "mpc_d"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no-checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_penalty_is_counted_once_a_step(kind: str, checkpointing: bool | None, micro_batches: int) -> None:
    """In anyone's loop: each micro-batch's mean loss divided by their number."""
    model = constrained_model(kind=kind)
    expected = expected_gradients(model, [task_loss(model, step) for step in range(micro_batches)])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    for step in range(micro_batches):
        ids = global_batch(step)
        (model(input_ids=ids, labels=ids, use_cache=False).loss / micro_batches).backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_penalty_follows_a_loss_that_the_trainer_divides_by_the_targets_of_the_step() -> None:
    model = constrained_model()
    expected = expected_gradients(model, [task_loss(model, step) for step in range(2)])
    items = sum(global_batch(step)[:, 1:].numel() for step in range(2))
    for step in range(2):
        ids = global_batch(step)
        model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(items)).loss.backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_penalty_follows_an_encoder_decoders_targets_of_which_none_is_left_out() -> None:
    """The Trainer counts all labels there, and one a row is enough for a share of the penalty."""

    def gradients(weight: float, batches: list[Tensor], items: int | None) -> dict[str, Tensor]:
        model = attach(
            tiny_model("T5ForConditionalGeneration", dropout_rate=0.0),
            SubspaceConfig(method="lora", rank=2, constraint="mpc_o", constraint_weight=weight),
        ).train()
        for labels in batches:
            share = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
            model(input_ids=labels, labels=labels, **share).loss.backward()
        return {name: p.grad for name, p in trained(model).items()}

    batches = [torch.tensor([[5], [6]]), torch.tensor([[7], [8], [9]])]
    with_penalty, without = (gradients(weight, batches, 5) for weight in (0.5, 0.0))
    once, nothing = (gradients(weight, batches[:1], None) for weight in (0.5, 0.0))
    for name, gradient in with_penalty.items():
        torch.testing.assert_close(gradient - without[name], once[name] - nothing[name], rtol=1e-4, atol=1e-5, msg=name)
    assert any((once[name] - nothing[name]).any() for name in once)


@pytest.mark.parametrize("kind", ["mpc_o", "mpc_d"])
def test_a_layer_that_all_blocks_share_is_penalised_once(kind: str) -> None:
    """Also where a reference is computed between the loss and its backward."""
    grads, ids = [], torch.arange(3, 11).view(2, 4)
    for weight in (0.5, 0.0):
        torch.manual_seed(0)
        model: nn.Module = transformers.AlbertForMaskedLM(tiny_config("AlbertConfig", num_hidden_layers=3))
        attach(model, SubspaceConfig(method="lora", rank=2, constraint=kind, constraint_weight=weight))
        for parameter in trained(model).values():
            parameter.data.normal_(std=0.3)
        loss = model.train()(input_ids=ids, labels=ids).loss
        with torch.no_grad(), disabled(model):
            model(input_ids=ids)
        loss.backward()
        grads.append({name: p.grad for name, p in trained(model).items()})
    constraint = Constraint(kind, 0.5)
    wanted = torch.autograd.grad(dense_penalty(model, constraint), list(trained(model).values()))
    for (name, gradient), expected in zip(grads[0].items(), wanted, strict=True):
        torch.testing.assert_close(gradient - grads[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_scaled_loss_scales_the_penalty_alike() -> None:
    model, ids = constrained_model(), global_batch(0)
    (model(input_ids=ids, labels=ids, use_cache=False).loss * 1024).backward()
    scaled = {name: p.grad / 1024 for name, p in trained(model).items()}
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(scaled[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_loss_made_from_the_logits_has_the_whole_penalty_whatever_was_before() -> None:
    """A forward without labels says nothing of its weight: it is a step's only one, and not scaled as the last was."""
    model, ids = constrained_model(), global_batch(0)
    (model(input_ids=ids, labels=ids, use_cache=False).loss * 1024).backward()
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = expected_gradients(model, [task_loss(model, 0)])
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_reported_loss_holds_no_penalty_and_the_penalty_is_known_apart() -> None:
    model, ids = constrained_model(), global_batch(0)
    plain = float(task_loss(model, 0).detach())
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == pytest.approx(plain, rel=1e-6)
    loss.backward()
    penalties = attached(model).penalties
    assert penalties is not None
    constraint = attached(model).settings.constraint
    assert constraint is not None
    assert penalties.total() == pytest.approx(float(dense_penalty(model, constraint)), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_norms_that_are_not_squared_are_averaged_over_the_matrices_that_there_are(method: str) -> None:
    """Two of a layer; of DoRA's, whose B a constraint leaves alone, one."""
    model, ids = constrained_model(method, power=1), global_batch(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    norms = []
    for name in attached(model).layers:
        part = model.get_submodule(name)
        for columns in (part.lora_A.t(), part.lora_B) if method == "lora" else (part.lora_A.t(),):
            columns = columns.detach()
            norms.append((columns.t() @ columns - torch.eye(columns.shape[1])).norm())
    penalties = attached(model).penalties
    assert penalties is not None
    assert penalties.total() == pytest.approx(0.5 * float(torch.stack(norms).mean()), rel=1e-5)


def test_reduction_sum_adds_the_layers_up() -> None:
    ids = global_batch(0)
    totals = []
    for reduction in ("mean", "sum"):
        model = constrained_model(reduction=reduction)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        penalties = attached(model).penalties
        assert penalties is not None
        totals.append(penalties.total())
    assert totals[1] == pytest.approx(totals[0] * len(attached(model).layers), rel=1e-5)


def test_evaluation_knows_no_penalty() -> None:
    model, ids = constrained_model(), global_batch(0)
    model.eval()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with_penalty = {name: p.grad.clone() for name, p in trained(model).items()}
    plain = odd_model("llama")
    attach(plain, SubspaceConfig(method="lora", rank=2))
    for name, parameter in trained(plain).items():
        parameter.data.copy_(dict(model.named_parameters())[name].data)
    plain.eval()
    plain(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(with_penalty[name], parameter.grad)
