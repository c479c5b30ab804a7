"""What a packed storage cannot hold is said with names and bytes, and a storage that would hold nothing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.stays_dense import check_packed
from dist_subspace.storage import FrozenLinear, adopt_all
from tests.tiny_models import tiny_config, tiny_model


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = nn.Linear(8, 8), Doubled(8, 8)
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))


def test_what_stays_dense_is_named_with_its_bytes_and_its_reason() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3)), "table": nn.Embedding(100, 8)})
    packed = [f"layers.{n}.same" for n in range(3)]
    said = check_packed(model, "nf4", torch.bfloat16, packed, {f"layers.{n}.other": "it doubles" for n in range(3)})
    assert said == [
        "held in bfloat16 and not in nf4: layers.0.other and 2 like it (432 B); it doubles",
    ]


def test_a_storage_that_would_hold_nothing_is_refused() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    with pytest.raises(
        UsageError, match=r"storage is 'nf4', but nothing of a ModuleDict .*layers.0.other: it doubles\).*bf16"
    ):
        check_packed(model, "nf4", torch.bfloat16, [], {"layers.0.other": "it doubles"})
    with pytest.raises(UsageError, match="it has no linear layers"):
        check_packed(nn.ModuleDict({"table": nn.Embedding(3, 2)}), "int8", torch.float32, [], {})


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
@torch.no_grad()
def test_falcons_linear_layers_are_held_and_compute_what_transformers_computes(storage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = transformers.FalconForCausalLM(tiny_config("FalconConfig", bias=True)).eval()
    for parameter in expected.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    expected.save_pretrained(tmp_path)
    model = load_frozen(tmp_path, storage=storage, dtype="float32")
    held = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear) and m.storage == storage}
    assert len(held) == 8 + (storage == "fp32")
    for name, operator in held.items():
        expected.get_submodule(name).weight.data = operator.dense()  # type: ignore[union-attr]
    ids = torch.arange(3, 20)[None]
    wanted = expected(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert len(adopt_all(expected)) == 9


HEADS = {
    "LlamaForSequenceClassification": ("LlamaConfig", {"score"}),
    "BertForSequenceClassification": ("BertConfig", {"classifier"}),
    "DistilBertForSequenceClassification": ("DistilBertConfig", {"pre_classifier", "classifier"}),
    "RobertaForSequenceClassification": ("RobertaConfig", {"classifier.dense", "classifier.out_proj"}),
    "T5ForSequenceClassification": ("T5Config", {"classification_head.dense", "classification_head.out_proj"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_classification_head_that_the_checkpoint_has_keeps_every_value(name: str, tmp_path: Path) -> None:
    kind, layers = HEADS[name]
    tiny_model(name, config_name=kind).save_pretrained(tmp_path)
    expected = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = load_frozen(tmp_path, storage="nf4", task="classification")
    held = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    dense = {n for n, operator in held.items() if operator.storage == "bf16"}
    assert dense == layers and len(held) > len(layers)
    for layer in layers:
        assert torch.equal(held[layer].dense(torch.bfloat16), expected.get_submodule(layer).weight), layer
