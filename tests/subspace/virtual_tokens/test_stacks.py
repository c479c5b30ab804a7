"""Where a model begins, and where its tokens stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.virtual_tokens import stacks
from tests.tiny_models import tiny_model

NAMES = {
    "LlamaForCausalLM": ["LlamaModel"],
    "GPT2LMHeadModel": ["GPT2Model"],
    "OPTForCausalLM": ["OPTDecoder"],  # its head calls the decoder without the base model around it
    "BertForMaskedLM": ["BertModel"],
    "T5ForConditionalGeneration": ["T5Stack", "T5Stack"],
}


@pytest.mark.parametrize("family", NAMES)
def test_the_stacks_are_what_the_head_calls(family: str) -> None:
    model = tiny_model(family)
    assert [type(stack).__name__ for stack in stacks.stacks(model)] == NAMES[family]


def test_a_module_that_is_no_transformer_is_refused() -> None:
    with pytest.raises(UsageError, match="need a transformers model, and Linear is none"):
        stacks.stacks(nn.Linear(2, 2))


def places(family: str, past: int = 0, mask: torch.Tensor | None = None, **arguments: Any) -> list[list[int]]:
    (stack,) = stacks.stacks(tiny_model(family))
    return stacks.positions(stack, arguments, mask, past).tolist()


def test_positions_are_counted_without_the_padding() -> None:
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = (ids != 0).long()
    assert places("LlamaForCausalLM", input_ids=ids) == [[0, 1, 2]]
    assert places("LlamaForCausalLM", mask=mask, input_ids=ids) == [[0, 1, 2], [0, 0, 1]]
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert places("LlamaForCausalLM", past=3, mask=longer, input_ids=ids[:, :1]) == [[3], [2]]
    assert places("LlamaForCausalLM", past=3, input_ids=ids[:, :1]) == [[3]]
    assert places("LlamaForCausalLM", input_ids=ids, position_ids=torch.tensor([[4, 5, 6]])) == [[4, 5, 6]]


def test_a_family_that_counts_from_behind_its_padding_does_so_here() -> None:
    model = tiny_model("RobertaForSequenceClassification")  # its padding is token 0
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    own = model.roberta.embeddings.create_position_ids_from_input_ids(ids, 0)
    found = places("RobertaForSequenceClassification", input_ids=ids)
    assert found[0] == own[0].tolist() and found[1][:2] == own[1, :2].tolist()
