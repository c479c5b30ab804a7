"""The table of what is trained and what is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.storage import storage_info, storages
from tests.tiny_models import tiny_model


def weights(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_full_spectrum_says_how_there_can_be_less_of_it() -> None:
    full, cut = (
        dsub.summary(dsub.attach(tiny_model(), SubspaceConfig(method="svdiff", options=options)))
        for options in ({}, {"top_k": 4})
    )
    assert "subspace.options.top_k" in str(full) and full.frozen > 2 * cut.frozen
    assert "top_k" not in str(cut) and "top_k" not in str(dsub.summary(dsub.attach(tiny_model())))


@pytest.mark.parametrize("storage", sorted(storages()))
def test_counts_are_of_weights_and_bytes_of_what_is_stored(storage: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = dsub.load_frozen(tmp_path, storage=storage)
    plain = dsub.summary(model)
    assert (plain.method, plain.trainable, plain.frozen) == (None, 0, weights(tiny_model()))
    assert plain.frozen_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    dsub.attach(model, SubspaceConfig(method="lora", rank=2))
    made = dsub.summary(model)
    assert made.method == "lora" and made.frozen == plain.frozen and made.frozen_bytes == plain.frozen_bytes
    assert made.trainable == sum(p.numel() for p in dsub.trainable_parameters(model))
    assert made.trainable_bytes == 4 * made.trainable
    assert sum(row.trainable for row in made.rows) == made.trainable
    assert sum(row.frozen for row in made.rows) == made.frozen
    assert sum(row.bytes_on_rank for row in made.rows) == made.trainable_bytes + made.frozen_bytes
    if storage_info(storage).bits < 16:
        assert plain.frozen_bytes < 2 * plain.frozen


def test_the_share_is_of_all_weights() -> None:
    model = dsub.attach(tiny_model(), SubspaceConfig(method="lora", rank=16))
    made, trained = dsub.summary(model), sum(p.numel() for p in dsub.trainable_parameters(model))
    assert made.share == pytest.approx(trained / weights(model)) and made.share > 0.2
    assert f"({100 * trained / weights(model):.3f} %)" in str(made)


def test_a_row_is_a_kind_of_layer() -> None:
    rows = {row.name: row for row in dsub.summary(dsub.attach(tiny_model(), SubspaceConfig(rank=2))).rows}
    assert rows["q_proj"].modules == 2 and rows["q_proj"].trainable == 2 * 2 * (32 + 32)
    assert rows["up_proj"].frozen == 2 * 32 * 44 and rows["embed_tokens"].trainable == 0


def test_modules_trained_in_full_are_counted() -> None:
    model = dsub.attach(tiny_model("Qwen2ForCausalLM"), SubspaceConfig(rank=2, modules_to_save=["lm_head"]))
    row = next(row for row in dsub.summary(model).rows if row.name == "lm_head")
    assert (row.modules, row.trainable, row.frozen) == (1, 96 * 32, 96 * 32)


def test_the_table_says_the_counts_in_words() -> None:
    model = dsub.attach(tiny_model(), SubspaceConfig(method="ssl"))
    made = dsub.summary(model)
    text = str(made)
    assert f"method ssl: {made.trainable:,} trainable of {made.trainable + made.frozen:,}" in text
    assert "v_proj" in text and f"{100 * made.share:.3f} %" in text
