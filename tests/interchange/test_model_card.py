"""The card can be read by the Hub, and its examples are Python that names the right things."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from dist_subspace.interchange.model_card import model_card

LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
    "task_type": "CAUSAL_LM",
    "modules_to_save": None,
    "dist_subspace": {"method": "lora", "rank": 16, "alpha": 32.0, "target_modules": ["q_proj"], "layers": ["a", "b"]},
}


def head(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(text))


def code(card: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    for block in blocks:
        ast.parse(block)
    return blocks


def test_a_method_that_peft_knows_is_shown_for_both_libraries() -> None:
    card = model_card(LORA, {"steps": 1200, "eval_loss": 1.23456, "learning rate": 2e-4, "absent": None})
    assert head(card) == {
        "library_name": "peft",
        "base_model": "meta-llama/Llama-3.1-8B",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["dist-subspace", "subspace-tuning", "lora"],
    }
    ours, peft = code(card)
    assert "dsub.load_adapter(" in ours and "AutoModelForCausalLM" in peft and "PeftModel" in peft
    for row in ("| steps | 1,200 |", "| eval loss | 1.235 |", "| learning rate | 0.0002 |", "| layers | 2 |"):
        assert row in card, row
    assert "absent" not in card and "None" not in card
    for row in ("| method | lora |", "| rank | 16 |", "| alpha | 32 |", "| target modules | q_proj |"):
        assert row in card, row


def test_what_peft_wrote_and_what_was_trained_in_full_are_in_the_table() -> None:
    theirs = {"peft_type": "LORA", "r": 8, "lora_alpha": 12, "target_modules": ["q", "v"], "modules_to_save": ["head"]}
    card = model_card(theirs, {})
    for row in ("| rank | 8 |", "| alpha | 12 |", "| target modules | q, v |", "| trained in full | head |"):
        assert row in card, row


def test_a_method_of_our_own_is_shown_for_ours_alone() -> None:
    config = {"peft_type": None, "task_type": "SEQ_CLS", "dist_subspace": {"method": "ssl"}}
    card = model_card(config, {})
    (ours,) = code(card)
    assert "task='classification'" in ours or 'task="classification"' in ours
    assert head(card)["library_name"] == "dist-subspace" and "base_model" not in head(card)


def test_a_local_base_model_is_no_repository_of_the_hub(tmp_path: Path) -> None:
    card = model_card(LORA | {"base_model_name_or_path": str(tmp_path)}, {})
    assert "base_model" not in head(card) and str(tmp_path) in code(card)[0]


def test_odd_names_break_neither_table_nor_code() -> None:
    card = model_card(LORA | {"base_model_name_or_path": 'a"b\\c'}, {"data": "a|b\nc", "name": "My adapter"})
    code(card)
    assert "| data | a\\|b c |" in card and "# My adapter" in card
