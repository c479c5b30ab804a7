"""Figures of an evaluation in a card that nobody has edited: a table, and results that the Hub reads."""

from __future__ import annotations

import math

from huggingface_hub import ModelCard

from dist_subspace.interchange.card_figures import with_figures
from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.interchange.card_training import Training
from dist_subspace.interchange.model_card import model_card
from tests.hub_writing import checked

DESCRIBED = {
    "peft_type": "LORA",
    "r": 4,
    "base_model_name_or_path": "owner/base",
    "task_type": "CAUSAL_LM",
    "dist_subspace": {"method": "lora", "rank": 4},
}
OURS = {"loss": (1.25, (1.2, 1.3)), "exact_match": (0.5, (0.25, 0.75)), "token_f1": (math.nan, None)}
BASES = {"loss": (2.5, None), "exact_match": (0.1, (0.0, 0.2))}


def results(card: str) -> list[tuple[str, str, float]]:
    found = ModelCard(card).data.eval_results or []
    return [(result.dataset_name, result.metric_type, result.metric_value) for result in found]


def test_figures_stand_in_the_text_and_among_the_results_of_the_hub() -> None:
    trained = Training(figures={"loss": 1.5}, measured_on="held.jsonl", picture="loss.png")
    card = with_figures(model_card(DESCRIBED, trained), "/home/me/test.jsonl", OURS, BASES)
    assert is_unedited(card) and checked(card)[0] == 200 and "/home/me" not in card
    assert "| loss | 1.25 [1.2, 1.3] | 2.5 |" in card and "| exact match | 0.5 [0.25, 0.75] | 0.1 [0, 0.2] |" in card
    assert "token f1" not in card and card.index("## Measured on test.jsonl") < card.index("## How to load it")
    assert ("held.jsonl", "loss", 1.5) in results(card) and ("test.jsonl", "exact_match", 0.5) in results(card)
    assert ModelCard(card).data.metrics == ["exact_match"]


def test_a_later_evaluation_of_the_same_data_takes_the_place_of_the_earlier_one_and_no_other() -> None:
    trained = Training(figures={"loss": 1.5}, measured_on="test.jsonl", picture="loss.png")
    card = with_figures(model_card(DESCRIBED, trained), "other.jsonl", {"loss": (3.0, None)})
    card = with_figures(card, "test.jsonl", OURS)
    card = with_figures(card, "test.jsonl", {"loss": (1.0, None)})
    assert card.count("## Measured on test.jsonl") == 1 and "| loss | 1 |" in card and "1.25" not in card
    assert results(card) == [("other.jsonl", "loss", 3.0), ("test.jsonl", "loss", 1.0)]
    assert "| loss | 3 |" in card and "![loss over the steps](loss.png)" in card and card.count("## License") == 1


def test_a_card_that_a_person_has_edited_is_theirs() -> None:
    edited = model_card(DESCRIBED, {}).replace("frozen", "sleeping")
    assert with_figures(edited, "test.jsonl", OURS) == edited
