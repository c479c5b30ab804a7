"""Every recipe for real models is what its header says: read, built on the meta device in its real size, its targets matched, its
method put on, its JSON taken by DeepSpeed's own classes, its numbers recomputed, and small enough for its hardware."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.config import load_config
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.optimizer_state import plain_optimizer
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.deepspeed.supported import check_supported
from dist_subspace.storage import storage_info
from dist_subspace.subspace import methods
from tests.config.recipes import FOLDER, GIB, RECIPES, Hardware, Recipe, Sizes, held, sizes_of
from tests.config.shapes import SHAPES, WEIGHTS
from tests.matrix import tiny
from tests.ranks import ROOT, run_on_ranks
from tests.tiny_models import save_odd

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


# The formula, against what two ranks hold.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def bytes_of_a_rank(folder: str, preset: str, storage: str) -> tuple[int, int, Sizes]:
    """After a step: bytes of what is frozen and of what is trained with its optimizer's state; and what the formula takes."""
    model = load_frozen(
        folder, storage=storage, double_quant=True, dtype="bfloat16", deepspeed=tiny.ds_config(PRESETS[preset])
    )
    attach(model, SubspaceConfig(method="lora", rank=4)).train()
    config = tiny.ds_config(PRESETS[preset], world_size=world().size)
    engine = tiny.make_engine(model, config)
    tiny.train_step(engine, tiny.own_batch(0, world().rank, world().size))
    frozen, trained = set[int](), set[int]()
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor, kind: set[int]) -> None:
        storage_of = tensor.untyped_storage()
        kind.add(storage_of.data_ptr())
        sizes[storage_of.data_ptr()] = storage_of.nbytes()

    for parameter in model.parameters():
        kind = trained if parameter.requires_grad else frozen
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and tensor.numel():
                keep(tensor, kind)
    for master, state in plain_optimizer(engine).state.items():
        for tensor in (master, *state.values()):
            if isinstance(tensor, Tensor) and tensor.numel() > 1:
                keep(tensor, trained)
    engine.destroy()
    del engine, model
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        asked: dict[str, Any] = {"model": {"path": folder, "storage": storage}, "subspace": {"rank": 4}}
        counted = sizes_of(plain, load_config(asked | {"data": {"train": "none.jsonl"}}))
    return sum(map(sizes.__getitem__, frozen)), sum(map(sizes.__getitem__, trained)), counted


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3"])
def test_the_bytes_of_a_rank_are_what_two_ranks_hold(llama: str, preset: str, storage: str) -> None:
    """But for the padding of shards and of what ZeRO aligns."""
    for frozen, trained, sizes in run_on_ranks(2, bytes_of_a_rank, llama, preset, storage):
        expected = held(sizes, preset, 2, 2)
        assert frozen == pytest.approx(expected.weights, rel=0.02)
        assert trained == pytest.approx(expected.adapter, rel=0.02)
