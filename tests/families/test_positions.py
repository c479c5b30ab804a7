"""Tables of positions, by the names that families give them."""

from __future__ import annotations

from dist_subspace.families.positions import has_learned_positions
from dist_subspace.subspace.virtual_tokens import stacks
from tests.tiny_models import tiny_model


def test_learned_positions_are_told_from_rotations_and_distances() -> None:
    learned = {"GPT2LMHeadModel", "OPTForCausalLM", "BertForMaskedLM"}
    for family in (*learned, "LlamaForCausalLM", "GPTNeoXForCausalLM"):
        (stack,) = stacks.stacks(tiny_model(family))
        assert has_learned_positions(stack) == (family in learned), family
