"""The card can be read by the Hub, and its examples are Python that names the right things."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.interchange.card_training import Training, data_name, is_data_set, license_of
from dist_subspace.interchange.card_usage import is_served
from dist_subspace.interchange.model_card import NO_LICENSE, merged_card, model_card
from tests.hub_writing import checked

LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
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
    assert (
        "vllm serve meta-llama/Llama-3.1-8B --enable-lora --max-lora-rank 16 --lora-modules adapter=path/to/this"
        in card
    )
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
    assert "base_model" not in head(card) and str(tmp_path) not in card
    assert f'dsub.load_frozen("path/to/{tmp_path.name}"' in code(card)[0]


def test_the_head_of_a_card_is_what_the_hub_takes_with_figures_data_and_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama9\n---\nThe base.\n")
    training = Training(
        facts={"name": "Mine", "steps": 3},
        datasets=("me/data",),
        figures={"loss": 1.25, "f1": 0.5, "pearson": 0.1},
        measured_on="eval.jsonl",
        picture="loss.png",
        license=license_of(tmp_path),
    )
    card = model_card(LORA, training)
    status, found = checked(card)
    assert status == 200, found
    data = ModelCard(card).data
    assert (
        data.datasets == ["me/data"]
        and data.metrics == ["f1", "pearsonr"]
        and data.base_model == "meta-llama/Llama-3.1-8B"
    )
    assert (data.license, data.license_name, data.model_name) == ("other", "llama9", "Mine")
    assert data.eval_results is not None
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured == {"loss": 1.25, "f1": 0.5, "pearsonr": 0.1} and data.eval_results[0].dataset_name == "eval.jsonl"
    assert (
        "![loss over the steps](loss.png)" in card
        and "| f1 | 0.5 |" in card
        and "llama9" in card.split("## License")[1]
    )
    assert NO_LICENSE in model_card(LORA, {}) and "license" not in head(model_card(LORA, {}))
    assert license_of(None) == license_of(tmp_path / "none") == {}


def test_a_merged_model_is_one_of_transformers_that_comes_from_its_base() -> None:
    card = merged_card(LORA, "LlamaForCausalLM")
    assert checked(card)[0] == 200 and "load_adapter" not in card and is_unedited(card)
    assert head(card)["library_name"] == "transformers" and head(card)["base_model_relation"] == "finetune"
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in code(card)[0]


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"peft_type": "IA3"}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"task_type": "SEQ_CLS"}, False),
        ({"alpha_pattern": {"q_proj": 3}}, False),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, True),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, False),
    ],
)
def test_vllm_is_shown_where_it_reads_the_files(change: dict[str, Any], served: bool) -> None:
    """By the rules that stand in tests/interchange/vllm_rules.py."""
    assert is_served(LORA | change) is served and ("vllm serve" in model_card(LORA | change, {})) is served


def test_no_folder_of_this_machine_is_in_a_name() -> None:
    assert data_name("/home/me/data/train.jsonl") == data_name("data/train.jsonl") == "train.jsonl"
    assert is_data_set("me/data") and data_name("me/data") == "me/data"
    assert not is_data_set("data/train.jsonl") and not is_data_set("./me/data")


def test_odd_names_break_neither_table_nor_code() -> None:
    card = model_card(LORA | {"base_model_name_or_path": 'a"b\\c'}, {"data": "a|b\nc", "name": "My adapter"})
    code(card)
    assert "| data | a\\|b c |" in card and "# My adapter" in card
