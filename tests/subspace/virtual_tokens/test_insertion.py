"""Where virtual tokens go in a row, and what a stack of blocks is given and gives back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace.virtual_tokens.insertion import Layout, default_placement
from tests.subspace.virtual_tokens.given import COUNT, ids, model_with
from tests.tiny_models import tiny_config, tiny_model


def spelled(layout: Layout) -> list[str]:
    """Each row as text: a letter for a given token, a digit for a virtual one."""
    rows = zip(layout.origin.tolist(), layout.within.tolist(), layout.virtual.tolist(), strict=True)
    return [
        "".join(str(w) if v else chr(97 + o) for o, w, v in zip(origin, within, virtual, strict=True))
        for origin, within, virtual in rows
    ]


@pytest.mark.parametrize(
    ("firsts", "skip", "rows"),
    [
        ([[0], [0]], 0, ["01abcd", "01abcd"]),
        ([[0], [2]], 0, ["01abcd", "ab01cd"]),  # the second is padded on its left
        ([[0], [2]], 1, ["a01bcd", "abc01d"]),
        ([[0], [3]], 1, ["a01bcd", "abcd01"]),
        ([[0, 2], [0, 3]], 0, ["01ab01cd", "01abc01d"]),
        ([[0, 1, 3], [0, 2, 4]], 0, ["01a01bc01d", "01ab01cd01"]),  # the second has a sample less
        ([[0, 1, 3], [0, 2, 4]], 1, ["a01b01cd01", "a01bc01d01"]),
    ],
)
def test_rows_are_lengthened_at_the_beginning_of_each_sample(
    firsts: list[list[int]], skip: int, rows: list[str]
) -> None:
    layout = Layout.of(torch.tensor(firsts), 4, 2, skip)
    assert spelled(layout) == rows
    assert torch.equal(layout.origin.gather(1, layout.real), torch.arange(4).expand(2, -1))
    assert not layout.virtual.gather(1, layout.real).any()


@pytest.mark.parametrize(("skip", "places"), [(0, [0, 1, 2, 3, 0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 0, 1, 2, 3, 4])])
def test_positions_grow_by_one_through_each_sample(skip: int, places: list[int]) -> None:
    layout = Layout.of(torch.tensor([[0, 2]]), 5, 2, skip)
    given = torch.tensor([[0, 1, 0, 1, 2]])
    assert (layout.lengthen(given) + layout.shift).tolist() == [places]


def test_a_row_with_fewer_samples_ends_in_a_sample_of_its_own() -> None:
    layout = Layout.of(torch.tensor([[0, 1, 3], [0, 2, 4]]), 4, 2, 0)
    given = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]])
    places = layout.lengthen(given) + layout.shift
    assert places[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert places[1, :8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and places[1, 8] != 4


def test_cutting_undoes_lengthening() -> None:
    layout = Layout.of(torch.tensor([[0, 1, 3], [0, 2, 4]]), 4, 2, 1)
    rows = torch.randn(2, 4, 3)
    assert torch.equal(layout.cut(layout.insert(layout.lengthen(rows), torch.randn(2, 3))), rows)


def seen_by_the_stack(model: Any, **inputs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    stack = model.base_model
    stack.register_forward_pre_hook(lambda module, args, kwargs: found.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    return found


def test_rows_packed_for_a_kernel_that_takes_lengths_have_new_ones() -> None:
    model, places = model_with("prompt"), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1]])
    edges = torch.tensor([0, 3, 7, 9, 12, 14], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 4, "max_length_k": 4}
    found = seen_by_the_stack(model, input_ids=ids(2, 7), position_ids=places, use_cache=False, **lengths)
    assert found["cu_seq_lens_q"].tolist() == [
        0,
        7,
        19,
        25,
        32,
        38,
    ]  # the first row ends in virtual tokens of no sample
    assert found["input_ids"].shape == (2, 7 + 3 * COUNT) and found["max_length_q"] == 12


def test_the_stack_sees_ids_mask_and_positions_of_the_longer_row() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    rows = ids(2, 5)
    found = seen_by_the_stack(model_with("prompt"), input_ids=rows, attention_mask=mask, use_cache=False)
    assert found["attention_mask"].tolist() == [[1] * 9, [0, 0, *[1] * 7]]
    assert found["position_ids"][0].tolist() == list(range(9))
    assert found["position_ids"][1, 2:].tolist() == list(range(7))
    assert torch.equal(found["input_ids"][1, 6:], rows[1, 2:])


def test_what_cannot_be_lengthened_is_refused_in_one_sentence() -> None:
    model, rows = model_with("prompt"), ids(2, 5)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "takes an attention_mask of two dimensions"),
        ({"attention_mask": torch.ones(2, 6)}, "attention_mask has 6 tokens, but 0 are cached and 5 are given"),
        ({"position_ids": torch.zeros(3, 2, 5, dtype=torch.long)}, "position_ids of two dimensions"),
    ]
    for more, reason in cases:
        with pytest.raises(UsageError, match=reason):
            model(input_ids=rows, **more)
    with pytest.raises(UsageError, match="static one has no place; accepted: a dynamic cache"):
        model.generate(rows, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_encoder_outputs_that_lost_their_virtual_tokens_are_refused() -> None:
    model, rows = model_with("prompt", "T5ForConditionalGeneration"), ids(2, 5)
    output = model(input_ids=rows, attention_mask=torch.ones_like(rows), decoder_input_ids=rows)
    cut = (output.encoder_last_hidden_state,)
    with pytest.raises(UsageError, match="hold 4 virtual tokens more than the mask"):
        model(encoder_outputs=cut, attention_mask=torch.ones_like(rows), decoder_input_ids=rows)


def test_token_types_go_with_their_tokens() -> None:
    model = model_with("prompt", "BertForSequenceClassification")
    types = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    found = seen_by_the_stack(model, input_ids=ids(2, 5), token_type_ids=types)
    assert found["token_type_ids"].tolist() == [[0, *[0] * COUNT, 0, 1, 1, 1]] * 2


def test_the_default_placement_follows_what_the_head_reads() -> None:
    assert default_placement(tiny_model("BertForSequenceClassification")) == "after-first"
    assert default_placement(tiny_model("BertForMaskedLM")) == "front"
    # No module of these says that it is causal.
    bloom = transformers.BloomForCausalLM(tiny_config("BloomConfig"))
    assert default_placement(bloom) == "front"
