"""Answers in batches are transformers' own, row by row, on any number of ranks and however the weights lie."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import Answer, answered, answers, as_answer, text_behind
from dist_subspace.generation.settings import generation_settings, greedy
from dist_subspace.generation.streaming import Pieces
from dist_subspace.placement.engines import start_use, use_config
from tests.interchange.trained import move
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd, tiny_config, tiny_model
from tests.tiny_run import make_tokenizer

PROMPTS = [[3, 4], [5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17], [4, 4, 4], [9, 3]]


def adapted(folder: str, preset: str = "none", method: str = "lora", storage: str = "fp32") -> Any:
    """Collective: a trained adapter on the model in the folder, placed by the preset."""
    config = use_config(preset, None, dtype="float32", storage=storage, unquantised=storage == "fp32")
    model = dsub.load_frozen(folder, storage=storage, dtype="float32", deepspeed=config)
    options = {"num_virtual_tokens": 4} if method == "prefix" else {}
    move(dsub.attach(model, dsub.SubspaceConfig(method, options=options)))
    return model, start_use(model, config)


def one_by_one(model: Any, **settings: Any) -> list[list[int]]:
    """transformers' own texts, a prompt at a time."""
    ends = model.generation_config.eos_token_id
    texts = []
    for prompt in PROMPTS:
        made = model.generate(torch.tensor([prompt]), pad_token_id=0, do_sample=False, **settings)[0, len(prompt) :]
        new = made.tolist()
        texts.append(new[: new.index(ends) + 1] if ends in new else new)
    return texts


def on_ranks(folder: str, preset: str, given: dict[str, Any], storage: str = "fp32") -> list[Answer]:
    model, close = adapted(folder, preset, storage=storage)
    config = generation_settings(model, given={"max_new_tokens": 9, **given})
    made = answers(model, make_tokenizer(), PROMPTS, config, batch_size=2, seed=3)
    close()
    return made


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("gpt2", "ssb"), ("llama", "prefix")])
def test_a_batch_gives_each_row_transformers_own_greedy_text(family: str, method: str, tmp_path: Path) -> None:
    model, _ = adapted(save_odd(tmp_path, family), method=method)
    made = answers(model, make_tokenizer(), PROMPTS, greedy(model, max_new_tokens=9), batch_size=3)
    texts = one_by_one(model, max_new_tokens=9)
    assert [list(answer.ids) for answer in made] == texts
    assert {answer.finish_reason for answer in made} == {"length"} | (
        {"stop"} if any(t[-1] == 2 for t in texts) else set()
    )


@pytest.mark.parametrize(
    ("ranks", "preset"), [(2, "zero0"), (2, "zero3"), pytest.param(3, "zero3", marks=pytest.mark.slow)]
)
def test_answers_are_the_same_on_any_number_of_ranks_whole_or_split(ranks: int, preset: str, tmp_path: Path) -> None:
    """Four batches: the last round of two ranks is full, that of three is not. Drawn ones too."""
    folder = save_odd(tmp_path, "llama")
    for given in [{}, {"temperature": 2.0}][preset == "zero0" :]:
        alone = on_ranks(folder, "none", given)
        assert len({answer.ids for answer in alone}) > 3
        assert all(seen == alone for seen in run_on_ranks(ranks, on_ranks, folder, preset, given))
    assert alone != on_ranks(folder, "none", {}), "these were drawn"


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("preset", ["zero3", "zero3-offload", "zero0"])
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3MoeForCausalLM"])
def test_answers_are_the_same_in_every_storage_and_placement(
    family: str, preset: str, storage: str, tmp_path: Path
) -> None:
    if family == "Qwen3MoeForCausalLM":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
        config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, decoder_sparse_step=1)
        torch.manual_seed(0)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    else:
        tiny_model(family).save_pretrained(tmp_path)
    alone = on_ranks(str(tmp_path), "none", {}, storage)
    assert len({answer.ids for answer in alone}) > 1
    for ranks in (2, 3):
        assert run_on_ranks(ranks, on_ranks, str(tmp_path), preset, {}, storage) == [alone] * ranks


def test_each_way_answers_each_prompt_and_what_has_an_answer_is_left_out(tmp_path: Path) -> None:
    model, _ = adapted(save_odd(tmp_path, "llama"))
    config, ways = greedy(model, max_new_tokens=6), (nullcontext, partial(dsub.disabled, model))
    some = [one for some in answered(model, make_tokenizer(), PROMPTS, config, 2, ways=ways, first=4) for one in some]
    with dsub.disabled(model):
        base = answers(model, make_tokenizer(), PROMPTS, config, batch_size=2)[4:]
    assert some == list(zip(answers(model, make_tokenizer(), PROMPTS, config, batch_size=2)[4:], base, strict=True))
    assert [ours.ids for ours, _ in some] != [theirs.ids for _, theirs in some]


def test_a_row_near_the_end_of_the_context_does_not_cut_the_others(tmp_path: Path) -> None:
    model, _ = adapted(save_odd(tmp_path, "gpt2"))
    config, near = greedy(model, max_new_tokens=20), [3 + i % 5 for i in range(30)]
    made = answers(model, make_tokenizer(), [[3, 4], near, [5]], config, batch_size=3)
    assert [len(answer.ids) for answer in made if answer.finish_reason == "length"][:1] == [20]
    assert len(made[1].ids) <= 2 and made[1].ids == made[1].ids[:2]
    with pytest.raises(UsageError, match="prompt 1 has 32 tokens; accepted: at most 31"):
        answers(model, make_tokenizer(), [[3] * 32], config)


def test_the_model_and_torchs_random_state_are_as_before() -> None:
    model = tiny_model()
    model.train()
    own, state = model.generation_config, torch.get_rng_state()
    answers(
        model, make_tokenizer(), [[3, 4]], generation_settings(model, given={"temperature": 1.0, "max_new_tokens": 2})
    )
    assert model.training and model.generation_config is own and torch.equal(state, torch.get_rng_state())


def test_an_answer_ends_before_its_end_and_at_a_text_that_stops_it() -> None:
    model, tokenizer = tiny_model(), make_tokenizer()
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    config = generation_settings(model, stops=[1])
    assert as_answer(tokenizer, config, [3], [*letters, 1, 1, 1]) == Answer("ab", (*letters, 1), "stop")
    assert as_answer(tokenizer, config, [3], letters) == Answer("ab", tuple(letters), "length")
    assert (
        as_answer(tokenizer, generation_settings(model, given={"stop_strings": "b"}), [3], letters).finish_reason
        == "stop"
    )


def test_no_prompt_has_no_answer() -> None:
    assert answers(tiny_model(), make_tokenizer(), []) == []


def test_a_word_behind_a_prompt_keeps_its_blank() -> None:
    """As sentencepiece has it: a blank belongs to the word behind it, and is not written before the first word of all."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "▁a", "▁b", "b"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert tokenizer.decode([2]) == "b"
    assert [text_behind(tokenizer, [0, 1], ids) for ids in ([2], [3])] == [" b", "b"]
    seen: list[str] = []
    pieces = Pieces(tokenizer, [0, 1], frozenset(), seen.append)
    for token in (1, 2, 3):
        pieces.put(torch.tensor([token]))
    assert seen == [" b", "b"]
