"""The loss of packed samples is the loss of the same samples alone, and no tokens x tokens mask is made for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)
from transformers.integrations import sdpa_attention

from dist_subspace.errors import UsageError
from dist_subspace.training.data import LEAK_LIMIT, enable_packing, packing_leak
from dist_subspace.training.data.collate import kernel_lengths
from tests.tiny_models import tiny_config
from tests.training.data.packed_for_tests import alone, packed_rows, total_loss

DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", Path(__file__).parents[4] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K" / "hf"

CONFIGS: dict[str, Any] = {
    "llama": lambda: tiny_config("LlamaConfig"),
    "gpt2": lambda: tiny_config("GPT2Config"),
    "qwen2": lambda: tiny_config("Qwen2Config"),
    "mistral-window": lambda: tiny_config("MistralConfig", sliding_window=4),
    "opt": lambda: tiny_config("OPTConfig"),
    "gpt-neox": lambda: tiny_config("GPTNeoXConfig"),
}


def tiny(name: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]() if name in CONFIGS else tiny_config("FalconConfig")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # at its initial size attention hardly matters to the loss
        parameter.data.mul_(3)
    return model.eval()


def samples(vocabulary: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in (9, 1, 13, 5, 7)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_samples_alone(name: str) -> None:
    model, parts = tiny(name), samples()
    expected = alone(model, parts)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable_packing(model)
    inputs, labels = packed_rows(parts)
    found = total_loss(model, inputs, labels)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for n, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not STORIES.is_dir(), reason="DIST_SUBSPACE_DATA holds no stories260K")
def test_the_real_model_has_the_same_loss_packed_and_alone() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="sdpa").eval()
    parts = samples(512)
    expected = float(alone(model, parts).detach())
    enable_packing(model)
    assert float(total_loss(model, *packed_rows(parts)).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_activation_checkpointing_keeps_samples_apart(reentrant: bool) -> None:
    model, parts = tiny("llama"), samples()
    enable_packing(model)
    inputs, labels = packed_rows(parts)
    total_loss(model, inputs, labels).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    total_loss(model.train(), inputs, labels).backward()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[n], rtol=1e-4, atol=1e-6)


def test_no_mask_is_made_for_packed_rows_and_attention_runs_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    enable_packing(model)
    seen: list[tuple[int, bool]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((query.shape[2], options["attn_mask"] is not None))
        return kernel(query, key, value, **options)

    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", watched)
    inputs, labels = packed_rows(samples())
    total_loss(model, inputs, labels)
    assert seen == [(9, False), (1, False), (13, False), (5, False), (7, False), (11, False)] * 2


def test_positions_that_are_written_over_in_place_are_read_again() -> None:
    model, parts = tiny("llama"), samples()
    enable_packing(model)
    inputs, labels = packed_rows(parts)
    expected = float(total_loss(model, inputs, labels).detach())
    buffer = torch.arange(23).expand(2, -1).clone()
    total_loss(model, {**inputs, "position_ids": buffer}, labels)
    buffer.copy_(inputs["position_ids"])
    assert float(total_loss(model, {**inputs, "position_ids": buffer}, labels).detach()) == pytest.approx(expected)


def test_padding_generation_and_evaluation_work_on_a_model_that_packs() -> None:
    plain, model = tiny("llama"), tiny("llama")
    enable_packing(model)
    ids = torch.stack([samples()[0], samples()[2][:9]])
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (plain, model))
    torch.testing.assert_close(a[mask == 1], b[mask == 1])
    a, b = (m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1) for m in (plain, model))
    assert torch.equal(a, b)


def test_a_model_that_mixes_packed_samples_is_found_out_and_one_that_does_not_is_not() -> None:
    first, second = samples()[0], samples()[2]
    assert packing_leak(tiny("opt"), first, second) > LEAK_LIMIT  # transformers' own attention: no borders for OPT
    assert packing_leak(tiny("falcon"), first, second) > LEAK_LIMIT
    for name in CONFIGS:
        model = tiny(name)
        enable_packing(model)
        assert packing_leak(model, first, second) < 1e-5, name
        assert packing_leak(model.to(torch.bfloat16), first, second) < LEAK_LIMIT, name


def test_a_model_that_looks_ahead_is_found_out() -> None:
    """Both samples change alike there, which must not pass for rounding."""
    model = tiny("opt")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    assert packing_leak(model, samples()[0], samples()[2]) > LEAK_LIMIT


@pytest.mark.parametrize("length", [9, 2048])
def test_a_memory_of_a_few_tokens_is_found_out_in_short_samples_and_in_long_ones(length: int) -> None:
    """A hybrid of attention and a recurrent state: what the state carries over the border is felt by the first tokens alone."""
    recurrent = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    torch.manual_seed(0)
    hybrid = AutoModelForCausalLM.from_config(tiny_config("FalconH1Config", num_key_value_heads=2, **recurrent)).eval()
    for parameter in hybrid.parameters():
        parameter.data.mul_(2)
    pure = tiny("llama")
    for model in (hybrid, pure):
        enable_packing(model)
    first, second = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(1))
    assert packing_leak(hybrid, first, second) > LEAK_LIMIT
    assert packing_leak(pure, first, second) < 1e-5


def test_the_bases_own_attention_dropout_is_drawn_in_packed_rows_as_in_each_sample_alone() -> None:
    torch.manual_seed(0)
    config = tiny_config("LlamaConfig", num_hidden_layers=1, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    parts = [samples()[0], samples()[2]]
    torch.manual_seed(1)
    alone = torch.cat([model(input_ids=part[None]).logits for part in parts], dim=1)
    enable_packing(model)
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    torch.manual_seed(1)
    packed = model(input_ids=torch.cat(parts)[None], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed, model.eval()(input_ids=torch.cat(parts)[None], position_ids=positions).logits)


def test_the_leak_is_seen_in_a_model_at_its_initial_values_too() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["opt"]()).eval()
    assert packing_leak(model, samples()[0], samples()[2]) > LEAK_LIMIT


def test_the_probe_draws_no_dropout_and_leaves_the_model_in_its_mode() -> None:
    config = tiny_config("LlamaConfig", attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    enable_packing(model)
    assert packing_leak(model, samples()[0], samples()[2]) < 1e-5
    assert model.training


def test_eager_attention_stays_and_keeps_samples_apart() -> None:
    model = tiny("llama", "eager")
    enable_packing(model)
    assert model.config._attn_implementation == "eager"
    assert packing_leak(model, samples()[0], samples()[2]) < 1e-5


def test_a_model_without_positions_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("BloomConfig"))
    with pytest.raises(UsageError, match="takes no position_ids"):
        enable_packing(model)


def test_lengths_for_the_kernel_are_those_that_transformers_would_derive() -> None:
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    inputs, _ = packed_rows(samples())
    found = kernel_lengths(inputs["position_ids"])
    (edges, _), (longest, _) = prepare_fa_kwargs_from_position_ids(inputs["position_ids"])
    assert torch.equal(found["cu_seq_lens_q"], edges) and found["max_length_k"] == int(longest)
