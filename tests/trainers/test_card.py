"""The card beside a trainer's adapter: ours, valid, and the person's once it is edited."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tests.trainers import bench


def test_the_card_names_trainer_method_and_tags_and_an_edited_one_stays(base: Path, tmp_path: Path) -> None:
    trainer = bench.made("DPOTrainer", base, tmp_path / "mine")
    trainer.create_model_card(model_name="mine", dataset_name="somebody/pairs", tags=["small"], license="mit")
    file = tmp_path / "mine" / "README.md"
    card = ModelCard.load(file)
    assert {"dpo", "trl", "small", "lora", "dist-subspace"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("peft", "mit", ["somebody/pairs"])
    assert "| trainer | DPOTrainer |" in card.text and "load_adapter" in card.text and str(tmp_path) not in card.content
    file.write_text(card.content + "\nMine.\n", encoding="utf-8")
    trainer.create_model_card(model_name="mine")
    assert file.read_text(encoding="utf-8").endswith("Mine.\n")
