"""Every recipe for real models is what its header says: read, built on the meta device in its real size, its targets matched, its
method put on, its JSON taken by DeepSpeed's own classes, its numbers recomputed, and small enough for its hardware."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.deepspeed.supported import check_supported
from dist_subspace.storage import storage_info
from dist_subspace.subspace import methods
from tests.config.headers import FOLDER, RECIPES
from tests.config.recipes import GIB, Hardware, Recipe
from tests.config.shapes import SHAPES, WEIGHTS
from tests.ranks import ROOT

EVERY = [Recipe(path) for path in RECIPES]
LAUNCHED = ("deepspeed launch/train.py", "launch/deepspeed.sh", "launch/slurm.sbatch")
GATED = ("meta-llama/",)


def every_recipe() -> Any:
    return pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.path.stem)


@every_recipe()
def test_a_recipes_header_is_what_its_model_and_its_method_give(recipe: Recipe) -> None:
    """`python -m tests.config.recipes` writes these lines."""
    assert {name: recipe.said.get(name) for name in recipe.computed()} == recipe.computed()


@every_recipe()
def test_a_recipe_fits_its_hardware(recipe: Recipe) -> None:
    """Weights and adapter alone are below the card's memory, and the peak of a step, as estimated, leaves a tenth of it."""
    held, hardware = recipe.held, recipe.hardware
    if hardware.memory:
        assert held.weights + held.node_weights + held.adapter < hardware.memory * GIB
        assert recipe.peak < 0.9 * hardware.memory * GIB
    on_host = hardware.devices * (held.host_weights + held.host_adapter)
    assert on_host < 0.75 * max(hardware.host, 1) * GIB if on_host else hardware.host == 0


@every_recipe()
def test_a_recipe_is_started_by_what_starts_its_hardware(recipe: Recipe) -> None:
    start, hardware = recipe.said["Start"], recipe.hardware
    script = re.search(r"launch/[\w.]+", start)
    assert f"configs/{recipe.path.name}" in start and (script is None or (ROOT / script[0]).is_file())
    if hardware.nodes > 1:
        assert "launch/slurm.sbatch" in start or "launch/deepspeed.sh" in start
    elif hardware.ranks > 1 and hardware.memory:
        assert start.startswith("deepspeed launch/train.py ")
    elif hardware.memory:
        assert start.startswith("dist-subspace train ")
    assert recipe.config.run.output_dir == f"runs/{recipe.path.stem}"


@every_recipe()
def test_a_recipe_says_whether_its_model_is_behind_a_licence(recipe: Recipe) -> None:
    name = recipe.config.model.path
    needs = f"HF_TOKEN of an account that accepted the licence at https://huggingface.co/{name}"
    assert recipe.said.get("Needs") == (needs if name.startswith(GATED) else None)


@every_recipe()
def test_a_statistic_that_takes_time_is_spoken_of(recipe: Recipe) -> None:
    if methods()[recipe.config.subspace.method].statistic not in ("none", "row norms"):
        assert "Set-up" in recipe.said


@every_recipe()
def test_deepspeed_takes_a_recipes_preset(recipe: Recipe) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config, hardware = recipe.config, recipe.hardware
    batch, micro = config.training.global_batch_size, config.training.per_device_train_batch_size
    assert batch is not None and batch % (micro * hardware.ranks) == 0, "no rank has an empty round"
    made = deepspeed_config(
        config.deepspeed.preset,
        micro_batch=micro,
        rounds=batch // (micro * hardware.ranks),
        world_size=hardware.ranks,
        trainable_numel=recipe.sizes.trained,
        block_numel=recipe.sizes.block,
        max_grad_norm=config.training.max_grad_norm,
        ranks_per_node=hardware.devices,
    )
    assert DeepSpeedZeroConfig(**made["zero_optimization"]).stage == PRESETS[config.deepspeed.preset]
    unquantised = storage_info(config.model.storage).dtype is not None
    check_supported(made, storage=config.model.storage, unquantised=unquantised, dtype=config.model.dtype or "bfloat16")


@every_recipe()
def test_a_recipes_rows_are_within_its_models_positions(recipe: Recipe) -> None:
    assert recipe.config.data.max_length <= SHAPES[recipe.config.model.path].max_position_embeddings


def test_every_file_of_the_folder_is_a_recipe_a_quickstart_or_a_json() -> None:
    quickstarts = set(FOLDER.glob("quickstart*.yaml"))
    assert {path for path in FOLDER.iterdir() if path.is_file()} - quickstarts == set(RECIPES)
    assert {recipe.config.model.path for recipe in EVERY} == set(SHAPES), "no shape without its recipe"


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_real_sizes_are_those_of_the_models(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if "roberta" in name else AutoModelForCausalLM
    with torch.device("meta"):
        assert sum(p.numel() for p in kind.from_config(SHAPES[name]).parameters()) == WEIGHTS[name]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("one GPU of 8 GB", Hardware(1, 1, 8, 0)),
        ("one node with 8 GPUs of 80 GB", Hardware(1, 8, 80, 0)),
        ("2 nodes with 8 GPUs of 80 GB each", Hardware(2, 8, 80, 0)),
        ("one node with 2 GPUs of 24 GB, and 64 GB of memory", Hardware(1, 2, 24, 64)),
        ("no GPU; 2 processes", Hardware(1, 2, 0, 0)),
    ],
)
def test_hardware_is_read_from_its_line(line: str, expected: Hardware) -> None:
    assert Hardware.read(line) == expected
