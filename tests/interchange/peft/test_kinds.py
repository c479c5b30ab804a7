"""What training on needs of an adapter of PEFT: its dropout, its penalty, its seeds, and a triplet's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG
from dist_subspace.interchange.peft.importing import read_peft
from dist_subspace.subspace import resolve
from tests.interchange.peft.adapters import assert_imported, lora, pruned, written
from tests.tiny_models import tiny_model

LAYERS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}


def adalora(**fields: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LAYERS, **fields)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["lora", "adalora", "vera", "miss"])
def test_it_trains_on_with_the_dropout_that_it_was_trained_with(kind: str, dropout: float, tmp_path: Path) -> None:
    made = {
        "lora": lambda: lora(lora_dropout=dropout),
        "adalora": lambda: adalora(lora_dropout=dropout),
        "vera": lambda: peft.VeraConfig(r=5, vera_dropout=dropout, **LAYERS),
        "miss": lambda: peft.MissConfig(r=5, miss_dropout=dropout, **LAYERS),
    }[kind]()
    assert read_peft(written(tmp_path, made)[0]).config.dropout == dropout


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_an_adalora_has_the_penalty_that_peft_gave_it_or_none(weight: float, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, adalora())
    described = json.loads((folder / CONFIG).read_text()) | {"orth_reg_weight": weight}  # PEFT itself trains with some
    (folder / CONFIG).write_text(json.dumps(described))
    config = read_peft(folder).config
    constraint = resolve(config).settings.constraint
    assert (0.0 if constraint is None else constraint.weight) == weight
    assert (config.rank, config.options["init_rank"]) == (2, 4)


@pytest.mark.parametrize("key", [0, 7])
def test_veras_projections_are_drawn_again_from_its_key_where_they_are_not_saved(key: int, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=5, projection_prng_key=key, save_projection=False, d_initial=0.2, **LAYERS)
    options = read_peft(written(tmp_path, config)[0]).config.options
    assert options == {"d_init": 0.2, "projection_seed": key, "save_projection": False}


def test_triplets_that_adalora_has_kept_come_back_to_their_places(tmp_path: Path) -> None:
    folder, _ = pruned(tmp_path)
    masks = json.loads((folder / CONFIG).read_text())["rank_pattern"]
    assert any(sorted(mask, reverse=True) != mask for mask in masks.values()), "the first are kept everywhere"
    tensors = read_peft(folder).tensors
    for name, mask in masks.items():
        e = tensors[f"base_model.model.{name.removesuffix('.lora_E')}.lora_E"].flatten()
        assert (e != 0).tolist() == mask


def described_otherwise(folder: Path, config: Any, **fields: Any) -> Path:
    """An adapter that PEFT saved, whose configuration says something else."""
    written(folder, config)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_weights": "bat"}, "init_weights is 'bat', whose update is made of blocks of the frozen matrix itself"),
        ({"r": 4}, r"holds .*\.miss_block as \[5, \d+\], which its configuration contradicts; it is damaged"),
        ({"init_weights": "mini", "mini_r": 3}, r"as \[5, \d+\], which its configuration contradicts"),
        ({"bias": "all", "a_field_of_tomorrow": 1}, "a_field_of_tomorrow is 1, which is not known here"),
    ],
    ids=["bat", "another rank", "other columns", "a field of tomorrow"],
)
def test_a_miss_that_computes_something_else_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_peft(described_otherwise(tmp_path, peft.MissConfig(r=5, **LAYERS), **fields))


def test_a_miss_knows_its_outputs(tmp_path: Path) -> None:
    shapes = read_peft(written(tmp_path, peft.MissConfig(r=5, **LAYERS))[0]).shapes
    assert shapes["model.layers.0.mlp.down_proj"] == (32, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coft": True}, "coft is True, which is not known here"),
        (
            {"r": 4, "oft_block_size": 0},
            r"r is 4, so many blocks in each layer, which makes blocks of \[8, 11\] inputs",
        ),
        ({"num_cayley_neumann_terms": 1}, "neumann_terms is 1; accepted: a whole number of at least 2"),
    ],
    ids=["coft", "blocks of two sizes", "one term"],
)
def test_an_oft_that_computes_something_else_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = described_otherwise(tmp_path, peft.OFTConfig(oft_block_size=8, **LAYERS), **fields)
    with pytest.raises(UsageError, match=message):
        resolve(read_peft(folder).config)


def test_an_oft_from_before_it_had_a_block_size_is_refused(tmp_path: Path) -> None:
    written(tmp_path, peft.OFTConfig(oft_block_size=8, **LAYERS))
    described = json.loads((tmp_path / CONFIG).read_text())
    described.pop("oft_block_size")
    (tmp_path / CONFIG).write_text(json.dumps(described))
    with pytest.raises(UsageError, match="oft_block_size is not said"):
        read_peft(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_an_oft_told_by_the_number_of_its_blocks_is_read_where_they_are_equal(shared: bool, tmp_path: Path) -> None:
    config = peft.OFTConfig(r=8, oft_block_size=0, block_share=shared, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder, expected = written(tmp_path, config)
    imported = read_peft(folder)
    assert imported.config.options["oft_block_size"] == 4
    assert imported.shapes["model.layers.0.self_attn.q_proj"] == (None, None if shared else 32)
    assert_imported(tiny_model(), folder, expected, "oft")
