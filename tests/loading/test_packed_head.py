"""A head in a storage of its own: the bytes of that storage, the loss of what they stand for, and the way out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import dist_subspace as dsub
from dist_subspace.api import load_adapted
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import PackedLinear, pack
from dist_subspace.storage.four_bit import FourBitLinear
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss, whole_logits_because
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import VOCABULARY, logits, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "model"
    tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=False, hidden_size=40).save_pretrained(made)
    return str(made)


def head_of_file(folder: str) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.lm_head.weight.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("head", ["nf4", "fp4", "int8", "fp8"])
def test_it_has_the_bytes_of_its_storage_and_all_else_is_as_it_was(storage: str, head: str, folder: str) -> None:
    model, plain = (dsub.load_frozen(folder, storage=storage, dtype="bfloat16", head_storage=h) for h in (head, None))
    expected = pack(head_of_file(folder), head)
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.storage == head
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.lm_head.get_parameter(name), parameter), name
    others = {n: p for n, p in plain.named_parameters() if not n.startswith("lm_head")}
    found = {n: p for n, p in model.named_parameters() if not n.startswith("lm_head")}
    assert found.keys() == others.keys() and all(torch.equal(found[n], p) for n, p in others.items())
    assert dsub.summary(model).frozen == dsub.summary(plain).frozen
    assert dsub.summary(model).frozen_bytes < dsub.summary(plain).frozen_bytes


def test_its_options_are_those_of_the_models_storage_where_both_are_one(folder: str) -> None:
    for nested in (True, False):
        for storage in ("nf4", "int8"):
            model = dsub.load_frozen(folder, storage=storage, double_quant=nested, head_storage="nf4")
            assert isinstance(model.lm_head, FourBitLinear) and model.lm_head.double_quant == nested


def refusal(folder: str | Path, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        dsub.load_frozen(folder, **arguments)
    return str(caught.value)


def test_what_cannot_be_is_refused_in_a_sentence(folder: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert "lm_head of this LlamaForCausalLM is its embedding" in refusal(tmp_path, head_storage="nf4")
    said = refusal(folder, head_storage="nf4", task="classification", pad_token_id=0)
    assert said == (
        "model.head_storage is 'nf4', but a LlamaForSequenceClassification has no language model's head; accepted: null"
    )
    assert "model.head_storage" in refusal(folder, head_storage="nf5") and "nf4" in refusal(folder, head_storage="nf5")
    assert "the head computes in bfloat16; accepted: null, fp4" in refusal(folder, head_storage="fp32")
    assert dsub.load_frozen(folder, head_storage="bf16").lm_head.storage == "bf16"  # type: ignore[union-attr]


def trained(folder: str, storage: str, head: str | None, stage: int) -> tuple[list[float], str | None, Tensor]:
    size = world().size
    config = tiny.ds_config(stage, world_size=size, trainable_numel=1 << 20)
    model = dsub.load_frozen(folder, storage=storage, dtype="float32", head_storage=head, deepspeed=config)
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2)).train()
    engine, losses = tiny.make_engine(model, config), []
    for step in range(3):
        ids = tiny.own_batch(step, world().rank, size)
        batch = MicroBatch(0, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), ids.numel())
        loss = micro_batch_loss(engine, batch, CPU) / batch.targets
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    why = whole_logits_because(engine, batch, CPU)
    with gathered(model.lm_head.parameters()):  # type: ignore[union-attr]
        matrix = model.lm_head.dense()  # type: ignore[union-attr,operator]
    engine.destroy()
    return losses, why, matrix


@pytest.mark.parametrize("head", ["nf4", "int8"])
def test_it_trains_split_as_it_does_whole(head: str, folder: str) -> None:
    (whole, why, matrix), *_ = run_on_ranks(1, trained, folder, "int8", head, 0)
    assert why is None and torch.equal(matrix, pack(head_of_file(folder), head).dense())
    ranks = run_on_ranks(2, trained, folder, "int8", head, 3)
    for _, why, split in ranks:
        assert why is None and torch.equal(split, matrix)
    for number, loss in enumerate(whole):
        assert sum(losses[number] for losses, _, _ in ranks) / 2 == pytest.approx(loss, rel=1e-5)


def adapted(folder: str, **config: Any) -> Any:
    model = dsub.load_frozen(folder, storage="int8", dtype="float32", head_storage="nf4")
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2, **config))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("base", ["dequantised", "original"])
@pytest.mark.parametrize(
    "config",
    [{}, {"new_tokens": [5, VOCABULARY]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=str,
)
def test_a_merge_writes_what_it_stands_for_or_the_files_own(
    config: dict[str, Any], base: str, folder: str, tmp_path: Path
) -> None:
    model = adapted(folder, **config)
    dsub.merge(model, tmp_path / "merged", base=base, dtype="float32", report=None)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if base == "dequantised":
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    if not config:
        original = head_of_file(folder)
        expected = original if base == "original" else pack(original, "nf4").dense()
        assert torch.equal(plain.lm_head.weight, expected)


def test_an_adapter_finds_its_base_as_it_was_held(folder: str, tmp_path: Path) -> None:
    model = adapted(folder)
    dsub.save_adapter(model, tmp_path / "adapter")
    again = load_adapted(tmp_path / "adapter", folder)
    assert again.lm_head.storage == "nf4" and again.model.layers[0].mlp.up_proj.base.storage == "int8"  # type: ignore[union-attr,index]
    assert torch.equal(logits(again), logits(model))
    dsub.export_peft(model, tmp_path / "peft")
    with_peft = dsub.import_peft(
        dsub.load_frozen(folder, storage="int8", dtype="float32", head_storage="nf4"), tmp_path / "peft"
    )
    torch.testing.assert_close(logits(with_peft), logits(model))


def test_its_loss_is_that_of_the_matrix_that_it_stands_for(folder: str) -> None:
    model = adapted(folder).train()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(0, {"input_ids": ids}, ids, 16, 2, 18)
    assert whole_logits_because(model, batch, CPU) is None
    loss = micro_batch_loss(model, batch, CPU)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    expected = functional.cross_entropy(
        (hidden @ pack(head_of_file(folder), "nf4").dense().t()).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
