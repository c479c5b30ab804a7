"""New tokens: only their rows are trained, logits have the larger vocabulary, the frozen tables stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dist_subspace import (
    SubspaceConfig,
    attach,
    disabled,
    load_adapter,
    load_frozen,
    save_adapter,
    trainable_parameters,
)
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import full_numel, gathered
from dist_subspace.subspace import named_trainables
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import VOCABULARY, save_odd, tiny_inputs, tiny_model, vision_model

IDS = (VOCABULARY, 40, VOCABULARY + 1)  # one reserved in the base, two that follow it
TIED, UNTIED = "LlamaForCausalLM", "Qwen2ForCausalLM"
each_family = pytest.mark.parametrize("family", [TIED, UNTIED, "GPT2LMHeadModel", "BertForMaskedLM"])


def with_tokens(family: str = TIED, method: str = "lora", ids: tuple[int, ...] = IDS, **config: Any) -> Any:
    rank = 2 if method == "lora" else None
    return attach(tiny_model(family), SubspaceConfig(method=method, rank=rank, new_tokens=ids, **config))


def randomise(model: Any) -> Any:
    with torch.no_grad():
        for number, parameter in enumerate(trainable_parameters(model)):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def some(rows: int = 2, length: int = 7) -> Tensor:
    ids = tiny_inputs(tiny_model(), rows=rows, length=length)["input_ids"].clone()
    ids[0, 2], ids[1, 4], ids[1, 5] = IDS[0], IDS[1], IDS[2]
    return ids


@each_family
def test_logits_have_the_larger_vocabulary_and_other_tokens_are_as_before(family: str) -> None:
    plain, model = tiny_model(family), with_tokens(family)
    inputs = tiny_inputs(plain)
    inputs["input_ids"][inputs["input_ids"] == 40] = 41
    with torch.no_grad():
        before, after = plain(**inputs).logits, model(**inputs).logits
    assert after.shape[-1] == VOCABULARY + 2 == model.config.vocab_size
    others = [i for i in range(VOCABULARY) if i != 40]
    assert torch.equal(after[..., others], before[..., others])


@each_family
def test_the_rows_begin_at_the_mean_of_the_tables(family: str) -> None:
    model = with_tokens(family)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    torch.testing.assert_close(model.new_tokens.embedding, table.mean(0).expand(3, -1), rtol=1e-5, atol=1e-6)
    assert (model.new_tokens.head is None) == (head is table)
    if model.new_tokens.head is not None:
        torch.testing.assert_close(model.new_tokens.head, head.mean(0).expand(3, -1), rtol=1e-5, atol=1e-6)


def enlarged(model: Any, family: str) -> Any:
    """A plain model whose tables hold the new rows: what merging makes."""
    plain, tokens = tiny_model(family, vocab_size=VOCABULARY + 2), model.new_tokens
    values = {}
    for name, value in tiny_model(family).state_dict().items():
        values[name] = tokens.enlarged(name, value.clone())
        assert tuple(values[name].shape) == tokens.enlarged_shape(name, value.shape)
    plain.load_state_dict(values)
    return plain


@pytest.mark.parametrize("family", [TIED, UNTIED, "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_it_computes_what_a_model_with_larger_tables_does_and_has_its_gradients(family: str) -> None:
    model = randomise(with_tokens(family))
    for name, parameter in named_trainables(model).items():
        if "lora" in name:
            parameter.data.zero_()
    plain, ids = enlarged(model, family), some()
    ours, theirs = (m(input_ids=ids, labels=ids) for m in (model, plain))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    order = sorted(IDS)
    expected = plain.get_input_embeddings().weight.grad[order]
    torch.testing.assert_close(model.new_tokens.embedding.grad, expected, rtol=1e-3, atol=1e-5)
    if model.new_tokens.head is not None:
        expected = plain.get_output_embeddings().weight.grad[order]
        torch.testing.assert_close(model.new_tokens.head.grad, expected, rtol=1e-3, atol=1e-5)


def test_a_model_whose_text_has_a_configuration_of_its_own_takes_its_loss_over_the_larger_vocabulary() -> None:
    one, two = VOCABULARY, VOCABULARY + 1
    new = SubspaceConfig(rank=2, new_tokens=[one, two])
    model = randomise(attach(vision_model("LlavaForConditionalGeneration"), new))
    ids = torch.tensor([[5, one, 7, two, 9], [one, two, 12, 13, one]])
    output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.logits.shape[-1] == VOCABULARY + 2
    torch.testing.assert_close(output.loss, expected)


SCALED = {
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 44}),
    "GemmaForCausalLM": ("GemmaConfig", {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 44}),
    "XGLMForCausalLM": ("XGLMConfig", {"d_model": 32, "ffn_dim": 44, "num_layers": 2, "attention_heads": 4}),
    "BartForCausalLM": (
        "BartConfig",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_ffn_dim": 44,
            "decoder_attention_heads": 4,
            "scale_embedding": True,
        },
    ),
}


def scaled(family: str, vocabulary: int) -> Any:
    """A model whose embeddings are multiplied before the first block, by √d or in the family's own way."""
    name, sizes = SCALED[family]
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0}
    changes = sizes | silent if "d_model" in sizes else common | sizes | {"pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, name)(vocab_size=vocabulary, **changes)
    return getattr(transformers, family)(config).eval()


@pytest.mark.parametrize("family", SCALED)
def test_new_rows_are_scaled_as_the_models_own_embedding_scales_its_rows(family: str) -> None:
    """Against transformers' model of the larger vocabulary, whose table holds the rows: hidden states, logits, gradients."""
    config = SubspaceConfig(method="ssl", new_tokens=IDS)
    model = attach(scaled(family, VOCABULARY), config)
    model.new_tokens.embedding.data.normal_(generator=torch.Generator().manual_seed(3))
    plain, tokens = scaled(family, VOCABULARY + 2), model.new_tokens
    small = scaled(family, VOCABULARY).state_dict()
    plain.load_state_dict({name: tokens.enlarged(name, value.clone()) for name, value in small.items()})
    ids = some()
    ours, theirs = (m(input_ids=ids, labels=ids, output_hidden_states=True) for m in (model, plain))
    torch.testing.assert_close(ours.hidden_states[0], theirs.hidden_states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    expected = plain.get_input_embeddings().weight.grad[sorted(IDS)]
    torch.testing.assert_close(model.new_tokens.embedding.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", [TIED, UNTIED, "GPT2LMHeadModel"])
def test_generation_can_say_a_new_token_and_goes_on_from_it(family: str) -> None:
    model, ids = randomise(with_tokens(family, ids=(VOCABULARY, VOCABULARY + 1))), some()
    spoken = model.new_tokens.embedding if model.new_tokens.head is None else model.new_tokens.head
    spoken.data.mul_(20)
    spoken.data[1] = -spoken.data[0]  # one of the two is the likeliest, whatever the hidden state
    found = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=found[:, :-1], use_cache=False).logits
    assert torch.equal(logits[:, -6:].argmax(-1), found[:, -6:])
    assert (found[:, -6:] >= VOCABULARY).any()


@each_family
def test_disabled_is_exactly_the_base_with_its_own_vocabulary(family: str) -> None:
    model, plain = randomise(with_tokens(family)), tiny_model(family)
    inputs = tiny_inputs(plain, labels=True)
    with torch.no_grad(), disabled(model):
        output, expected = model(**inputs), plain(**inputs)
        assert torch.equal(output.logits, expected.logits) and model.config.vocab_size == VOCABULARY
        torch.testing.assert_close(output.loss, expected.loss)
        with pytest.raises(UsageError, match=f"token {VOCABULARY + 1}, which the base alone does not know"):
            model(input_ids=some())
    assert model(input_ids=some()).logits.shape[-1] == VOCABULARY + 2


def test_tokens_within_the_vocabulary_alone_leave_it_as_large_as_it_was() -> None:
    model = randomise(with_tokens(ids=(40, 50)))
    assert model(input_ids=some() % VOCABULARY).logits.shape[-1] == VOCABULARY == model.config.vocab_size


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning", "ssl"])
def test_virtual_tokens_and_new_ones_go_together(method: str) -> None:
    """A sample that begins with a new token lends its id to the virtual tokens' places, and not its row."""
    model, ids = randomise(with_tokens(method=method)).eval(), some()
    ids[:, 0] = VOCABULARY + 1
    other = ids.clone()
    other[:, 0] = 7
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (2, 7, VOCABULARY + 2)
        model(input_ids=other)
    count = seen[0].shape[1] - 7
    assert torch.equal(seen[0][:, :count], seen[1][:, :count])
    assert not torch.equal(seen[0][:, count], seen[1][:, count])


def test_an_encoder_decoder_knows_them_on_both_sides() -> None:
    model = randomise(with_tokens("T5ForConditionalGeneration"))
    inputs = {"input_ids": some(), "decoder_input_ids": some()}
    output = model(**inputs)
    assert output.logits.shape == (2, 7, VOCABULARY + 2)
    plain = enlarged(model, "T5ForConditionalGeneration")
    for name, parameter in named_trainables(model).items():
        if "lora" in name:
            parameter.data.zero_()
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


@each_family
def test_they_are_saved_with_the_adapter_and_loaded_back(family: str, tmp_path: Path) -> None:
    model = randomise(with_tokens(family)).eval()
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model(family), tmp_path).eval()
    names = {"base_model.model.new_tokens.embedding", "base_model.model.new_tokens.head"}
    assert names & adapter_tensors(model).keys() == (names if model.new_tokens.head is not None else {min(names)})
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=some()).logits, model(input_ids=some()).logits)


def test_a_methods_layer_on_the_head_keeps_its_place() -> None:
    model = randomise(with_tokens(UNTIED, target_modules=["lm_head"]))
    names = set(named_trainables(model))
    assert names == {"lm_head.lora_A", "lm_head.lora_B", "new_tokens.embedding", "new_tokens.head"}
    assert model(input_ids=some()).logits.shape[-1] == VOCABULARY + 2


def test_a_copy_has_rows_of_its_own() -> None:
    model = randomise(with_tokens())
    other = copy.deepcopy(model)
    other.new_tokens.embedding.data.add_(1)
    with torch.no_grad():
        assert not torch.allclose(other(input_ids=some()).logits, model(input_ids=some()).logits)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"new_tokens": (VOCABULARY + 1,)}, r"\[97\] above the base's vocabulary of 96; accepted: .* without a gap"),
        ({"new_tokens": (3, 3)}, "accepted: token ids, each once"),
        ({"new_tokens": (-1,)}, "accepted: token ids, each once"),
        ({"new_tokens": (3,), "modules_to_save": ["embed_tokens"]}, "trains .* in full, and there are new tokens"),
    ],
)
def test_bad_ids_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        attach(tiny_model(), SubspaceConfig(rank=2, **config))


NEW = (tiny.VOCABULARY, 5, tiny.VOCABULARY + 1)


def train_on_ranks(folder: Path) -> list[dict[str, Any]]:
    """Three steps at stage 3 with every threshold at 0, tied and untied, on inputs that hold new tokens."""
    return [_train(folder, family) for family in ("llama", "gpt2")]


def batch(step: int) -> Tensor:
    ids = tiny.global_batch(step)
    ids[:, 1], ids[::2, 3], ids[:, 5] = NEW[0], NEW[1], NEW[2]
    return ids


def sgd(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def whole(model: Any) -> dict[str, Tensor]:
    parameters = {name: p for name, p in named_trainables(model).items() if name.startswith("new_tokens")}
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def _load(folder: Path, family: str, config: dict[str, Any] | None) -> Any:
    return load_frozen(folder / family, storage="fp32", deepspeed=config, device="cpu")


def _train(folder: Path, family: str) -> dict[str, Any]:
    rank, size = world().rank, world().size
    config = SubspaceConfig(rank=2, new_tokens=NEW)
    model = attach(_load(folder, family, tiny.ds_config(3, world_size=size)), config)
    start = whole(model)
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=trained, world_size=size), sgd)  # type: ignore[arg-type]
    engine.train()
    share = tiny.BATCH // size
    own = [batch(step)[rank * share : (rank + 1) * share] for step in range(tiny.STEPS)]
    losses = [tiny.train_step(engine, ids) for ids in own]
    split = all(is_partitioned(p) for p in model.parameters())
    name = str(folder / f"adapter-{family}")
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=batch(9), use_cache=False).logits
        save_adapter(model, name)
        again = load_adapter(_load(folder, family, None), name).eval()
        difference = float((again(input_ids=batch(9), use_cache=False).logits - logits).abs().max())
    end = whole(model)
    engine.destroy()
    return {"start": start, "losses": losses, "end": end, "split": split, "again": difference}


def test_new_tokens_train_on_two_ranks_under_zero_3_as_in_one_process(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        save_odd(tmp_path, family)
    ranks = run_on_ranks(2, train_on_ranks, tmp_path)
    for number, family in enumerate(("llama", "gpt2")):
        model = attach(_load(tmp_path, family, None), SubspaceConfig(rank=2, new_tokens=NEW)).train()
        start, optimizer, losses = whole(model), sgd(trainable_parameters(model), 0.5), []
        assert len(start) == (1 if family == "gpt2" else 2)
        for step in range(tiny.STEPS):
            rows = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in batch(step)]
            optimizer.zero_grad()
            torch.stack(rows).mean().backward()
            optimizer.step()
            losses.append([float(loss.detach()) for loss in rows])
        for rank, seen in enumerate(found[number] for found in ranks):
            assert seen["split"] and seen["again"] < 1e-5
            assert seen["losses"] == pytest.approx([sum(r[2 * rank : 2 * rank + 2]) / 2 for r in losses], rel=1e-4)
            for name, value in whole(model).items():
                torch.testing.assert_close(seen["start"][name], start[name], rtol=0, atol=0)
                assert not torch.allclose(value, start[name], atol=1e-3)
                torch.testing.assert_close(seen["end"][name], value, rtol=1e-3, atol=1e-5)
