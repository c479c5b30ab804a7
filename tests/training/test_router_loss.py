"""The routers' auxiliary loss against transformers' own, which a model with labels adds to its loss when it is asked for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.families.experts import routers_among
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.head_loss import proof_of
from dist_subspace.training.loss import micro_batch_loss
from dist_subspace.training.router_loss import ASKS, about_routers, router_loss_of, trained_routers
from tests.families import reference
from tests.families.cases import TASKS, Case
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
# Routers of one matrix, of several layers, and with a coefficient under another name.
FAMILIES = ["mixtral", "gpt_oss", "jetmoe", "dbrx"]


def batch(number: int = 0) -> MicroBatch:
    ids = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(number))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, : 1 + number] = -100
    targets = int((labels[:, 1:] != -100).sum())
    return MicroBatch(number, {"input_ids": ids, "attention_mask": mask}, labels, targets, 2, int(mask.sum()))


def with_routers(model: Any) -> Any:
    """A method on something else, and the routers trained in full, with values that make the loss a large one."""
    names = [n for n, _ in model.named_parameters()]
    owners = sorted({name.rpartition(".")[0] for name in routers_among(model, names)})
    linear = [n for n, m in model.named_modules() if hasattr(m, "in_features") and n not in owners]
    target = next(name for name in linear if not routers_among(model, [name]))
    config = dsub.SubspaceConfig(method="lora", rank=1, target_modules=[target], modules_to_save=owners)
    dsub.attach(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained_routers(model):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def merged_into(plain: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, TrainedCopy):
                for own, parameter in module.trained.named_parameters():
                    plain.get_parameter(f"{name}.{own}").copy_(parameter)


def theirs(plain: Any, given: MicroBatch) -> Tensor:
    plain.requires_grad_(True)
    loss: Tensor = plain(**given.inputs, labels=given.labels, **{ASKS: True}).loss
    return loss


# Families that have no experts in a small configuration of their own.
CHANGES: dict[str, tuple[tuple[str, Any], ...]] = {"doge": (("is_moe", True),), "flint": (("mlp_only_layers", [0]),)}


def check(model_type: str, folder: Path) -> None:
    case = Case("causal-lm", model_type, changes=CHANGES.get(model_type, ()))
    reference.make_folder(case, folder)
    plain, model = reference.load(case, folder), with_routers(reference.load(case, folder)).eval()
    merged_into(plain, model)
    given = batch()
    made = router_loss_of(model)
    assert made is not None and 0 < made.coefficient < 1
    loss = micro_batch_loss(model, given, CPU) / given.targets
    right = theirs(plain, given)
    assert float(loss.detach()) == pytest.approx(float(right.detach()), rel=1e-5)
    without = plain(**given.inputs, labels=given.labels, **{ASKS: False}).loss
    assert abs(float((right - without).detach())) > 1e-5, "the auxiliary loss is large enough to be seen"
    loss.backward()
    right.backward()
    for name in trained_routers(model):
        own = plain.get_parameter(name.replace(".trained.", ".")).grad
        torch.testing.assert_close(model.get_parameter(name).grad, own, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        measured = float(micro_batch_loss(model, given, CPU)) / given.targets
    assert measured == pytest.approx(float(without), rel=1e-5), "evaluation measures the targets alone"
    said = about_routers(model)
    assert said is not None and f"the family's auxiliary loss, {made.coefficient:g} x" in said


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_is_the_one_that_transformers_makes_with_its_routers_logits(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path / "model")


def balanced() -> list[str]:
    """Every model type with a causal language model that can be asked for its routers' logits and has a loss of them."""
    import transformers

    mapping = getattr(modeling_auto, TASKS["causal-lm"][0])
    found = []
    for model_type, name in mapping.items():
        kind = getattr(transformers, name, None)
        source = "" if kind is None else inspect.getsource(kind.forward)
        if "aux_loss" in source and ASKS in source:
            found.append(model_type)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_family_with_such_a_loss_has_it(tmp_path: Path) -> None:
    wrong = {}
    for model_type in balanced():
        try:
            check(model_type, tmp_path / model_type)
        except Exception as error:  # each family's own
            wrong[model_type] = f"{type(error).__name__}: {error}"[:300]
    assert len(balanced()) > 15 and not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def mixtral(**changes: Any) -> Any:
    return tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **SIZES | changes)


def test_it_is_beside_the_loss_that_is_made_inside_the_head() -> None:
    model = with_routers(mixtral())
    assert proof_of(model, batch().inputs["input_ids"], CPU).reason is None


def test_a_frozen_router_has_no_such_loss_and_a_family_without_one_says_so() -> None:
    frozen = dsub.attach(mixtral(), dsub.SubspaceConfig(method="lora", rank=1))
    assert router_loss_of(frozen) is None and about_routers(frozen) is None
    without = tiny_model(
        "DeepseekV3ForCausalLM", config_name="DeepseekV3Config", n_routed_experts=4, n_group=1, topk_group=1
    )
    model = with_routers(without)
    said = about_routers(model)
    assert router_loss_of(model) is None and said is not None
    assert (
        said.startswith("model.layers.1.mlp.gate") and "has no auxiliary loss that keeps experts equally busy" in said
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_pass_its_gradient_on_or_it_is_refused(reentrant: bool) -> None:
    model, other = with_routers(mixtral()).train(), with_routers(mixtral()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(UsageError, match=r"has no gradient, because recomputed .* training.use_reentrant false"):
            micro_batch_loss(model, batch(), CPU)
        return
    for one in (model, other):
        micro_batch_loss(one, batch(), CPU).backward()
    for name in trained_routers(model):
        torch.testing.assert_close(model.get_parameter(name).grad, other.get_parameter(name).grad)


def test_two_ranks_step_as_transformers_does_on_both_micro_batches(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mixtral(vocab_size=19).save_pretrained(folder)
    ranks = run_on_ranks(2, stepped, str(folder))
    (alone,) = run_on_ranks(1, stepped, str(folder))
    plain = mixtral(vocab_size=19)
    model = with_routers(type(plain).from_pretrained(folder))
    merged_into(plain, model)
    total = sum(batch(number).targets for number in range(2))
    sum(theirs(plain, batch(number)) * batch(number).targets / total for number in range(2)).backward()  # type: ignore[union-attr]
    for moved in (*ranks, alone):
        assert moved.keys() == set(trained_routers(model))
        for name, step in moved.items():
            right = plain.get_parameter(name.replace(".trained.", ".")).grad
            torch.testing.assert_close(step, right, rtol=1e-3, atol=1e-6)


def stepped(folder: str) -> dict[str, Tensor]:
    """How the routers move in one step of rate 1 over two micro-batches, under ZeRO-3."""
    size = world().size
    config = tiny.ds_config(3, trainable_numel=1, world_size=size)
    config |= {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_accumulation_steps": 2 // size}
    model = with_routers(dsub.load_frozen(folder, storage="fp32", deepspeed=config)).train()
    before = {name: model.get_parameter(name).detach().clone() for name in trained_routers(model)}
    engine = tiny.make_engine(model, config, lambda parameters, lr: torch.optim.SGD(parameters, lr=1.0))
    own = range(2) if size == 1 else [world().rank]
    total = sum(batch(number).targets for number in range(2))
    for number in own:
        loss = micro_batch_loss(engine, batch(number), CPU)
        engine.backward(loss * size / total * (2 // size))
        engine.step()
    with gathered(dsub.trainable_parameters(model)):
        return {name: held - model.get_parameter(name).detach() for name, held in before.items()}
