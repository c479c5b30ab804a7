"""Prefix: the golden numbers, the counts, PEFT's own logits from our file, families that cannot have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from dist_subspace import attach, save_adapter, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import read_description
from dist_subspace.subspace import Settings
from dist_subspace.subspace.reconstruction.prefix import Prefix
from dist_subspace.subspace.virtual_tokens.attention import attention_with_prefix, redirect
from dist_subspace.subspace.virtual_tokens.slots import Slot
from tests.subspace.virtual_tokens.given import COUNT, config, ids, model_with
from tests.tiny_models import tiny_config, tiny_model

Q = torch.tensor([[1.0, 0], [0, 1]])
K = torch.tensor([[1.0, 1], [0, 2]])
V = torch.tensor([[1.0, 2], [3, 4]])
P = torch.tensor([[[[2.0, -1]]], [[[-1.0, 1]]]])  # keys and values, one head, one virtual token
GOLDEN = torch.tensor([[-0.3395230987, 1.3302384507], [2.0913309739, 3.165650605]])  # docs/methods.md, "prefix"


class Enabled(nn.Module):
    enabled = True


def attention(implementation: str, **changes: Any) -> LlamaAttention:
    small = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    module = LlamaAttention(tiny_config("LlamaConfig", **small, attn_implementation=implementation), layer_idx=0)
    redirect(module, Slot(Enabled(), 1, 2))
    module.prefix_slot.tokens = P
    return module


def rows(x: Tensor) -> Tensor:
    return x[None, None].contiguous()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_golden_numbers_with_a_mask_and_without(implementation: str) -> None:
    module = attention(implementation)
    causal = torch.tensor([[True, False], [True, True]])[None, None]
    masks: dict[str, list[Tensor | None]] = {
        "sdpa": [None, causal],
        "eager": [torch.zeros(1, 1, 2, 2).masked_fill(~causal, torch.finfo(torch.float32).min)],
    }
    for mask in masks[implementation]:
        found, _ = attention_with_prefix(module, rows(Q), rows(K), rows(V), mask, scaling=2**-0.5)
        torch.testing.assert_close(found[0, :, 0], GOLDEN, rtol=1e-6, atol=1e-6)


def test_the_golden_numbers_for_each_of_two_packed_samples() -> None:
    twice = [rows(torch.cat([x, x])) for x in (Q, K, V)]
    places = torch.tensor([[1, 2, 1, 2]])  # moved by the prefix's length, as they arrive
    found, _ = attention_with_prefix(attention("sdpa"), *twice, None, scaling=2**-0.5, position_ids=places)
    torch.testing.assert_close(found[0, :, 0], torch.cat([GOLDEN, GOLDEN]), rtol=1e-6, atol=1e-6)


def varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """What a kernel that takes lengths computes: sample by sample, causal from the end."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    outputs = []
    for n in range(len(options["cu_seq_lens_q"]) - 1):
        a, b = options["cu_seq_lens_q"][n : n + 2].tolist()
        c, d = options["cu_seq_lens_k"][n : n + 2].tolist()
        assert b - a <= options["max_length_q"] and d - c <= options["max_length_k"]
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * options["scaling"]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outputs).view(query.shape[0], query.shape[2], *outputs[0].shape[1:]), None


def test_the_golden_numbers_through_a_kernel_that_takes_lengths() -> None:
    transformers.AttentionInterface.register("tested_varlen", varlen)
    edges = torch.tensor([0, 2, 4], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 2, "max_length_k": 2}
    batch = [torch.cat([rows(x), rows(x)]) for x in (Q, K, V)]  # two rows, flattened by the kernel
    found, _ = attention_with_prefix(attention("tested_varlen"), *batch, None, scaling=2**-0.5, **lengths)
    torch.testing.assert_close(found[:, :, 0], torch.stack([GOLDEN, GOLDEN]), rtol=1e-6, atol=1e-6)


def from_the_end(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """What flash attention computes without a mask."""
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    scores = (query @ key.mT * options["scaling"]).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def test_new_tokens_behind_a_filled_cache_see_the_prefix_the_cache_and_themselves() -> None:
    transformers.AttentionInterface.register("tested_flash", from_the_end)
    old = torch.tensor([[0.5, -1.0]])
    given = rows(Q), rows(torch.cat([old, K])), rows(torch.cat([2 * old, V]))
    found, _ = attention_with_prefix(attention("tested_flash"), *given, None, scaling=2**-0.5)
    mask = torch.tensor([[True, True, False], [True, True, True]])[None, None]
    expected, _ = attention_with_prefix(attention("sdpa"), *given, mask, scaling=2**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_implementation_below_is_the_one_that_the_model_names_at_the_moment() -> None:
    model, rows_ = model_with("prefix"), ids(2, 7)
    with torch.no_grad():
        expected = model(input_ids=rows_).logits
        model.set_attn_implementation("eager")
        output = model(input_ids=rows_, output_attentions=True)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert output.attentions[0].shape == (2, 4, 7, COUNT + 7)


def counted(**options: Any) -> int:
    """Of a model of width 8 with two layers whose keys are 8 wide, with 5 virtual tokens."""
    model = tiny_model(hidden_size=8, num_attention_heads=2)
    attach(model, config("prefix", **{"num_virtual_tokens": 5, **options}))
    return sum(p.numel() for p in trainable_parameters(model))


def test_counts() -> None:
    assert counted() == 160
    assert counted(projection=True, projection_dim=6) == 318


def test_grouped_queries_have_keys_as_wide_as_their_groups() -> None:
    model = model_with("prefix")  # 4 heads of 8, 2 of them for keys
    assert model.prefix_tokens.prompt_embeddings.shape == (COUNT, 2 * 2 * 16)


def test_encoder_and_decoder_self_attention_have_a_prefix_and_cross_attention_has_none() -> None:
    model = model_with("prefix", "T5ForConditionalGeneration")
    assert model.prefix_tokens.prompt_embeddings.shape == (COUNT, 4 * 2 * 32)
    slots = [name for name, module in model.named_modules() if hasattr(module, "prefix_slot")]
    assert len(slots) == 4 and not any("EncDec" in name for name in slots)


def test_initial_values() -> None:
    model = attach(tiny_model(), config("prefix"))
    assert 0.015 < float(model.prefix_tokens.prompt_embeddings.detach().std()) < 0.025
    for options in ({}, {"projection": True}):
        model = attach(tiny_model(), config("prefix", init="zero", **options))
        assert not model.prefix_tokens().any()


def test_the_projection_is_pefts() -> None:
    """PEFT's own encoder with our values gives our matrix: a column a key or value, layer by layer."""
    ours = model_with("prefix", "GPT2LMHeadModel", projection=True, projection_dim=6).prefix_tokens
    settings = {"num_virtual_tokens": COUNT, "token_dim": 32, "num_layers": 2, "encoder_hidden_size": 6}
    theirs = PrefixEncoder(peft.PrefixTuningConfig(prefix_projection=True, **settings))
    values = [ours.embedding, ours.down, ours.down_bias, ours.up, ours.up_bias]
    with torch.no_grad():
        for theirs_own, own in zip(theirs.parameters(), values, strict=True):
            theirs_own.copy_(own)
        torch.testing.assert_close(ours.matrix(), theirs(torch.arange(COUNT)))
        assert ours.matrix().abs().max() > 0


def test_projected_keys_and_values_train_through_the_projection() -> None:
    model = model_with("prefix", projection=True, projection_dim=6)
    model(input_ids=ids(2, 7), labels=ids(2, 7)).loss.backward()
    names = {name for name, p in model.prefix_tokens.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {"embedding", "down", "down_bias", "up", "up_bias"}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"])
@pytest.mark.parametrize("projection", [False, True])
def test_peft_computes_the_same_from_our_file(name: str, projection: bool, tmp_path: Path) -> None:
    model, rows_ = model_with("prefix", name, projection=projection), ids(2, 7)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    mask = torch.ones_like(rows_)
    mask[0, 5:] = 0
    with torch.no_grad():
        for padding in (torch.ones_like(rows_), mask):
            found = theirs(input_ids=rows_, attention_mask=padding).logits
            expected = model(input_ids=rows_, attention_mask=padding).logits
            torch.testing.assert_close(found[padding == 1], expected[padding == 1], rtol=1e-4, atol=1e-5)


def test_peft_is_not_promised_what_it_does_otherwise(tmp_path: Path) -> None:
    for family in ("T5ForConditionalGeneration", "BertForMaskedLM"):
        save_adapter(model_with("prefix", family), tmp_path)
        assert read_description(tmp_path)["peft_type"] is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("FalconForCausalLM", "cannot reach the attention of FalconForCausalLM"),
        ("BartForCausalLM", "takes no position_ids"),
    ],
)
def test_families_that_cannot_have_a_prefix_are_refused_untouched(family: str, reason: str) -> None:
    made = tiny_config(family.replace("ForCausalLM", "Config"), num_hidden_layers=1)
    model = getattr(transformers, family)(made)
    with pytest.raises(UsageError, match=reason):
        attach(model, config("prefix"))
    assert not hasattr(model, "subspace") and any(p.requires_grad for p in model.parameters())


def test_layers_that_share_one_attention_are_refused_untouched() -> None:
    model = transformers.AlbertForMaskedLM(tiny_config("AlbertConfig"))
    with pytest.raises(UsageError, match="method prefix needs an attention for each layer"):
        attach(model, config("prefix"))
    assert not hasattr(model, "subspace") and any(p.requires_grad for p in model.parameters())


def test_added_positions_are_the_virtual_tokens() -> None:
    assert Prefix.added_positions(Settings(options={"num_virtual_tokens": 7})) == 7
