"""Large tables and heads of a split model stay where they lie: as it trains and writes with gathered ones, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.apart import is_gathered_when_called
from dist_subspace.placement.tensors import gathered
from dist_subspace.subspace import named_trainables, trainable_parameters
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss, whole_logits_because
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.sent_bytes import recorded
from tests.tables_in_place import from_the_first_byte
from tests.tiny_models import tiny_inputs, tiny_model

CPU = torch.device("cpu")


class Largest:
    """The most entries that the head's and the table's weight had while any module ran, and how often each module was called."""

    def __init__(self, model: nn.Module) -> None:
        head = output_embeddings(model)
        table = model.get_input_embeddings()  # type: ignore[operator]
        self.weights = [w for m in (head, table) if m is not None for w in m.parameters() if not w.requires_grad]
        self.most = 0
        for module in model.modules():
            module.register_forward_hook(self._look, prepend=True)

    def _look(self, *_: Any) -> None:
        self.most = max(self.most, *(w.numel() for w in self.weights))


def batch_of(step: int, length: int | None = None) -> MicroBatch:
    """Of another length on each rank, where none is given."""
    size, rank = world().size, world().rank
    ids = tiny.own_batch(step, rank, size)[:, : length or tiny.LENGTH - 2 * rank]
    return MicroBatch(0, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), ids.numel())


def trained(folder: str, large: bool, config: dict[str, Any], how: dict[str, Any], zero: dict[str, Any]) -> Any:
    """Two steps, an evaluation between them: losses, trained parameters, the most of a table that was seen, what was sent."""
    if not large:
        return _trained(folder, config, how, zero)
    with from_the_first_byte():
        return _trained(folder, config, how, zero)


def _trained(folder: str, config: dict[str, Any], how: dict[str, Any], zero: dict[str, Any]) -> dict[str, Any]:
    made = tiny.ds_config(3, trainable_numel=1 << 20, world_size=world().size, **zero)
    storage = {"storage": "nf4", "dtype": "float32", **how.get("load", {})}
    model = load_frozen(folder, **storage, deepspeed=made)
    attach(model, SubspaceConfig(**{"method": "lora", "rank": 3, **config})).train()
    if "checkpointing" in how:
        model.gradient_checkpointing_enable({"use_reentrant": how["checkpointing"]})  # type: ignore[operator]
    engine, seen, losses = tiny.make_engine(model, made), Largest(model), []
    for step in range(2):
        with recorded() as messages:
            if how.get("whole_logits"):
                ids = batch_of(step).inputs["input_ids"]
                loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                loss = micro_batch_loss(engine, batch_of(step), CPU) / batch_of(step).targets
            engine.backward(loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            losses += [float(loss.detach()), float(micro_batch_loss(engine, batch_of(step + 2), CPU))]
        engine.train()
    with gathered(trainable_parameters(model)):
        values = {name: p.detach().clone() for name, p in named_trainables(model).items()}
    text = _written(engine) if how.get("writes") else None
    why = whole_logits_because(engine, batch_of(0), CPU)
    engine.destroy()
    kinds = [m.kind for m in messages]
    return {"losses": losses, "values": values, "most": seen.most, "kinds": kinds, "text": text, "why": why}


def _written(engine: Any) -> Tensor:
    """The ranks' texts end at other places."""
    engine.eval()
    length = 3 + 4 * world().rank
    text: Tensor = engine.module.generate(
        tiny.global_batch(9)[:1, :3], max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return text


CASES: dict[str, dict[str, Any]] = {
    "plain": {"how": {"writes": True}},
    "tied": {"tied": True, "how": {"writes": True}},
    "logits": {"how": {"whole_logits": True}},
    "reentrant": {"how": {"checkpointing": True}},
    "checkpointing": {"tied": True, "how": {"checkpointing": False}},
    "inside": {"tied": True, "config": {"new_tokens": [5, tiny.VOCABULARY]}},
    "above": {"config": {"new_tokens": [5, tiny.VOCABULARY]}},
    "prompt": {"config": {"method": "prompt", "rank": None, "options": {"num_virtual_tokens": 3}}},
    "cpu": {"zero": {"offload_param": {"device": "cpu", "pin_memory": False}}},
    "bf16": {"how": {"load": {"storage": "bf16", "dtype": "bfloat16"}}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    made = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("models") / "model"
        model = tiny_model("LlamaForCausalLM", vocab_size=tiny.VOCABULARY, tie_word_embeddings=tied, hidden_size=40)
        model.save_pretrained(folder)
        made[tied] = str(folder)
    return made


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_with_gathered_tables(name: str, folders: dict[bool, str]) -> None:
    case = {"tied": False, "config": {}, "how": {}, "zero": {}, **CASES[name]}
    ranks = 1 if name == "bf16" else 2
    arguments = (case["config"], case["how"], case["zero"])
    ours, theirs = (run_on_ranks(ranks, trained, folders[case["tied"]], large, *arguments) for large in (True, False))
    tolerance = 2e-2 if name == "bf16" else 1e-5
    for one, other in zip(ours, theirs, strict=True):
        assert one["why"] is None and other["why"] is None
        assert one["losses"] == pytest.approx(other["losses"], rel=tolerance)
        assert one["most"] == 0 < other["most"], "neither table nor head was whole"
        for key, expected in other["values"].items():
            torch.testing.assert_close(one["values"][key], expected, rtol=10 * tolerance, atol=tolerance)
        assert (one["text"] is None) == (other["text"] is None)
        assert one["text"] is None or torch.equal(one["text"], other["text"])
        assert "exchange" in one["kinds"] or ranks == 1
        assert "exchange" not in other["kinds"]


# class -> its configuration's class, the task, what the configuration says beside the tiny sizes
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", "causal-lm", {}),
    "OPTForCausalLM": ("OPTConfig", "causal-lm", {}),
    "PhiForCausalLM": ("PhiConfig", "causal-lm", {"tie_word_embeddings": False}),
    "Gemma2ForCausalLM": ("Gemma2Config", "causal-lm", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", "causal-lm", {"head_dim": 8}),
    "GraniteForCausalLM": ("GraniteConfig", "causal-lm", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "CohereForCausalLM": ("CohereConfig", "causal-lm", {"logit_scale": 0.25}),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        "causal-lm",
        {"head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4, "hidden_size_per_layer_input": 6}
        | {"vocab_size_per_layer_input": 96, "num_key_value_heads": 2, "altup_num_inputs": 2, "layer_types": None}
        | {"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [44, 44]},
    ),
    "T5ForConditionalGeneration": ("T5Config", "seq2seq-lm", {}),
    "BertForSequenceClassification": ("BertConfig", "classification", {}),
}


def of_family(folder: str, task: str, large: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    if not large:
        return _of_family(folder, task)
    with from_the_first_byte():
        return _of_family(folder, task)


def _of_family(folder: str, task: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss and the gradients of one step, and how many tables and heads an engine gathers."""
    config = tiny.ds_config(3, trainable_numel=1 << 20, world_size=world().size)
    model = load_frozen(folder, storage="fp32", deepspeed=config, task=task)
    attach(model, SubspaceConfig(method="lora", rank=2)).train()
    with torch.no_grad(), gathered(trainable_parameters(model)):
        for parameter in trainable_parameters(model):
            parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view(parameter.shape))
    engine = tiny.make_engine(model, config)
    inputs = tiny_inputs(model, labels=True)
    if task == "causal-lm":
        labels = inputs.pop("labels")
        batch = MicroBatch(0, inputs, labels, labels[:, 1:].numel(), len(labels), labels.numel())
        loss = micro_batch_loss(engine, batch, CPU)
    else:
        loss = engine(**inputs).loss
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is output_embeddings(model)]
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p) for name, p in named_trainables(model).items()}
    engine.destroy()
    return loss.detach(), gradients, sum(map(is_gathered_when_called, tables))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_table_and_head_is_right(name: str, tmp_path: Path) -> None:
    """Scaled tables, positions with an offset, tables of every layer, tables of two stacks; caps, scales and biases of heads."""
    config, task, changes = FAMILIES[name]
    tiny_model(name, config_name=config, **changes).save_pretrained(tmp_path)
    ours, theirs = (run_on_ranks(2, of_family, str(tmp_path), task, large) for large in (True, False))
    for (loss, gradients, left), (expected, others, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        for key, gradient in others.items():
            assert float((gradients[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, key
        assert left == 0
