"""How long a row may be, and whether padding changes what a model says: asked of models of other families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.generation.answers import answers
from dist_subspace.generation.room import longest_row, padded, takes_padding
from dist_subspace.generation.settings import greedy
from tests.tiny_models import tiny_config, tiny_model
from tests.tiny_run import make_tokenizer


def test_virtual_tokens_take_their_places_from_the_row() -> None:
    assert longest_row(tiny_model("GPT2LMHeadModel"), 70) == 64
    model = dsub.attach(tiny_model("GPT2LMHeadModel"), dsub.SubspaceConfig("prompt", options={"num_virtual_tokens": 5}))
    assert longest_row(model, 70) == 59


def test_padding_stands_where_the_answer_does_not_follow_it() -> None:
    ids, mask = padded([[3, 4], [5]], 9, torch.device("cpu"), right=False)
    assert ids.tolist() == [[3, 4], [9, 5]] and mask.tolist() == [[1, 1], [0, 1]]
    ids, mask = padded([[3, 4], [5]], 9, torch.device("cpu"), right=True)
    assert ids.tolist() == [[3, 4], [5, 9]] and mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_attention_takes_padding(family: str) -> None:
    assert takes_padding(tiny_model(family))


def test_a_recurrent_model_that_reads_padding_is_answered_in_rows_of_one_length() -> None:
    config = tiny_config("RwkvConfig", attention_hidden_size=32)
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    assert not takes_padding(model)
    prompts = [[3, 4], [5, 6, 7], [8, 9]]
    made = answers(model, make_tokenizer(), prompts, greedy(model, max_new_tokens=4), batch_size=3)
    for prompt, answer in zip(prompts, made, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        assert list(answer.ids) == alone.tolist()[: len(answer.ids)]


def test_an_encoder_decoder_answers_transformers_own_texts(tmp_path: Path) -> None:
    model = tiny_model("T5ForConditionalGeneration")
    prompts = [[3, 4], [5, 6, 7, 8], [9]]
    made = answers(model, make_tokenizer(), prompts, greedy(model, max_new_tokens=5), batch_size=3)
    for prompt, answer in zip(prompts, made, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, 1:]
        assert list(answer.ids) == alone.tolist()[: len(answer.ids)]
