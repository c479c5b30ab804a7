"""Virtual tokens in whole models: lengths, padding, generation, packing, checkpointing, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_subspace import attach, disabled, load_adapter, save_adapter, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.subspace import named_trainables
from dist_subspace.training.data import enable_packing, packing_leak
from tests.subspace.virtual_tokens.given import COUNT, DECODERS, METHODS, config, greedy, ids, model_with, padded
from tests.tiny_models import FAMILIES, tiny_inputs, tiny_model
from tests.training.data.packed_for_tests import alone, packed_rows, total_loss

each_method = pytest.mark.parametrize("method", METHODS)
each_decoder = pytest.mark.parametrize("family", DECODERS)


@each_method
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_long_as_the_input_and_disabled_is_exactly_the_base(method: str, family: str) -> None:
    base = tiny_model(family)
    inputs = tiny_inputs(base)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = model_with(method, family)
        found = model(**inputs).logits
        assert found.shape == expected.shape and not torch.allclose(found, expected, atol=1e-3)
        with disabled(model):
            assert torch.equal(model(**inputs).logits, expected)


@each_method
@each_decoder
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_row_has_the_logits_of_the_row_alone(method: str, family: str, side: str) -> None:
    model, samples = model_with(method, family), [ids(1, 9)[0], ids(1, 5, seed=4)[0]]
    rows, mask = padded(samples, side)
    with torch.no_grad():
        together = model(input_ids=rows, attention_mask=mask).logits
        for sample, row, own in zip(samples, together, mask, strict=True):
            torch.testing.assert_close(row[own == 1], model(input_ids=sample[None]).logits[0], rtol=1e-4, atol=1e-5)


@each_method
@pytest.mark.parametrize("family", ["BertForMaskedLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_padded_row_of_an_encoder_has_the_logits_of_the_row_alone(method: str, family: str) -> None:
    model, samples = model_with(method, family), [ids(1, 9)[0], ids(1, 5, seed=4)[0]]
    sides = ["right"] if "Sequence" in family else ["right", "left"]  # a pooled first token is padding on the left
    for side in sides:
        rows, mask = padded(samples, side)
        more = {"decoder_input_ids": ids(2, 4)} if "T5" in family else {}
        with torch.no_grad():
            together = model(input_ids=rows, attention_mask=mask, **more).logits
            for n, (sample, own) in enumerate(zip(samples, mask, strict=True)):
                single = model(input_ids=sample[None], **{k: v[n : n + 1] for k, v in more.items()}).logits[0]
                row = together[n][own == 1] if family == "BertForMaskedLM" else together[n]
                torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-4)


@each_method
@each_decoder
def test_generation_with_a_cache_is_the_recomputation_without(method: str, family: str) -> None:
    model, prompt = model_with(method, family), ids(2, 6)
    found = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, greedy(model, prompt, 6))


@each_method
def test_generation_of_a_left_padded_batch_is_that_of_each_row(method: str) -> None:
    model, samples = model_with(method, "GPT2LMHeadModel"), [ids(1, 9)[0], ids(1, 5, seed=4)[0]]
    rows, mask = padded(samples, "left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(rows, attention_mask=mask, **options)
    for n, sample in enumerate(samples):
        single = model.generate(sample[None], attention_mask=torch.ones_like(sample)[None], **options)
        assert torch.equal(together[n, -5:], single[0, -5:])


def test_a_prefix_is_not_in_the_cache_which_may_be_static() -> None:
    model, prompt = model_with("prefix"), ids(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(found, greedy(model, prompt, 4))


@each_method
def test_beams_and_an_encoder_decoder_generate_too(method: str) -> None:
    model = model_with(method)
    beams = model.generate(ids(2, 6), max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert beams.shape == (2, 10)
    model, rows = model_with(method, "T5ForConditionalGeneration"), ids(2, 6)
    found = model.generate(rows, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=rows, decoder_input_ids=expected, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@each_method
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("ours", [True, False])
def test_packed_samples_have_the_loss_and_gradients_of_the_samples_alone(method: str, family: str, ours: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(3, 64, (length,), generator=generator) for length in (9, 1, 13, 5, 7)]
    model = model_with(method, family)
    expected = alone(model, parts)
    expected.backward()
    gradients = [p.grad.clone() for p in trainable_parameters(model)]
    model.zero_grad()
    if ours:
        enable_packing(model)
    found = total_loss(model, *packed_rows(parts))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, gradient in zip(trainable_parameters(model), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    if ours:
        assert packing_leak(model, parts[0], parts[2]) < 1e-5


@each_method
def test_the_order_of_attaching_and_enabling_packing_does_not_matter(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(3, 64, (length,), generator=generator) for length in (9, 1, 13, 5, 7)]
    late = model_with(method)
    enable_packing(late)
    early = tiny_model()
    enable_packing(early)
    attach(early, config(method))
    early.load_state_dict(late.state_dict())
    losses = [float(total_loss(m.eval(), *packed_rows(parts)).detach()) for m in (late, early)]
    assert losses[0] == losses[1]


@each_method
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(method: str, family: str, reentrant: bool) -> None:
    options = {"projection": True} if method == "prefix" else {}
    model = model_with(method, family, **options).train()
    inputs = tiny_inputs(model, labels=True)
    model(**inputs, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in named_trainables(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (model(**inputs, use_cache=False).loss + model(**inputs, use_cache=False).loss).backward()
    for name, parameter in named_trainables(model).items():
        assert expected[name].abs().max() > 0, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-3, atol=1e-4 * scale)


@each_method
def test_the_models_own_loss_is_the_loss_of_its_logits(method: str) -> None:
    model, rows = model_with(method), ids(2, 7)
    output = model(input_ids=rows, labels=rows)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@each_method
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_saved_adapter_loads_with_the_same_outputs(method: str, family: str, tmp_path: Path) -> None:
    options = {"prefix": {"projection": True}, "p-tuning": {"encoder": "lstm"}}.get(method, {})
    model = model_with(method, family, **options)
    inputs = tiny_inputs(model)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model(family), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-6)
    assert len(trainable_parameters(again)) == 1
    save_adapter(again, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@each_method
def test_more_tokens_than_the_model_has_positions_are_refused(method: str) -> None:
    model = model_with(method)
    with torch.no_grad():
        model(input_ids=ids(1, 64 - COUNT))
    with pytest.raises(
        UsageError, match=r"4 virtual tokens and 61 of the input are more than the model's 64 positions"
    ):
        model(input_ids=ids(1, 64 - COUNT + 1))


@each_method
def test_a_copy_of_the_model_has_tokens_of_its_own(method: str) -> None:
    model, rows = model_with(method), ids(2, 7)
    before = model(input_ids=rows).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trainable_parameters(other):
            parameter.add_(1.0)
        assert torch.equal(model(input_ids=rows).logits, before)
        assert not torch.allclose(other(input_ids=rows).logits, before, atol=1e-3)


@each_method
def test_the_computation_runs_in_the_models_type_and_the_tokens_stay_float32(method: str) -> None:
    model = attach(tiny_model().to(torch.bfloat16), config(method))
    rows = ids(2, 7)
    output = model(input_ids=rows, labels=rows)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable_parameters(model))


@each_method
def test_hidden_states_are_as_long_as_the_input(method: str) -> None:
    output = model_with(method)(input_ids=ids(2, 7), output_hidden_states=True)
    assert {tuple(h.shape) for h in output.hidden_states} == {(2, 7, 32)}
    output = model_with(method, "T5ForConditionalGeneration")(
        input_ids=ids(2, 7), decoder_input_ids=ids(2, 3), output_hidden_states=True
    )
    assert output.encoder_last_hidden_state.shape == (2, 7, 32)
    assert {tuple(h.shape) for h in output.encoder_hidden_states} == {(2, 7, 32)}


@each_method
def test_embeddings_may_be_given_in_the_place_of_ids(method: str) -> None:
    model, rows = model_with(method), ids(2, 7)
    with torch.no_grad():
        expected = model(input_ids=rows).logits
        found = model(inputs_embeds=model.get_input_embeddings()(rows)).logits
    torch.testing.assert_close(found, expected)
