"""Bytes on the device: the frozen model has its storage's and nothing beside, and a step stays below what its shapes say."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.subspace import trainable_parameters
from tests.gpu.device import DEVICE
from tests.matrix import tiny

HIDDEN, INNER, LAYERS, VOCABULARY = 1024, 2816, 4, 1000
MATRICES = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
ROWS = LAYERS * (4 * HIDDEN + 2 * INNER + HIDDEN)
BESIDE = 2 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)  # embedding, head and norms in bfloat16
BYTES = {
    "bf16": 2 * MATRICES,
    "int8": MATRICES + 4 * ROWS,
    "nf4": MATRICES // 2 + 4 * MATRICES // 64,
    "nf4-double": MATRICES // 2 + MATRICES // 64 + 4 * MATRICES // (64 * 256),
}
SLACK = 2**20  # the allocator's blocks are multiples of 512 bytes; rotary frequencies, tables of codes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("larger") / "model"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def requested(which: str = "current") -> int:
    """Bytes that were asked for; `memory_allocated` counts the allocator's blocks, which are up to 1 MiB larger."""
    gc.collect()
    return int(torch.cuda.memory_stats(DEVICE)[f"requested_bytes.all.{which}"])


@pytest.fixture(scope="module", autouse=True)
def libraries_have_their_workspaces() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(64, 64, device=DEVICE, dtype=dtype)
        torch.addmm(matrix, matrix, matrix)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", BYTES)
def test_the_frozen_model_has_the_bytes_of_its_storage_and_a_step_stays_below_its_shapes(
    kind: str, stage: int, model_folder: Path
) -> None:
    before = requested()
    storage, _, nested = kind.partition("-")
    config = tiny.ds_config(stage)
    model = load_frozen(model_folder, storage=storage, double_quant=bool(nested), dtype="bfloat16", deepspeed=config)
    held = requested() - before
    assert BYTES[kind] + BESIDE <= held <= BYTES[kind] + BESIDE + SLACK

    attach(model, SubspaceConfig(method="dora", rank=8)).train()
    trained = sum(p.numel() for p in trainable_parameters(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = tiny.ds_config(stage, trainable_numel=trained)
    if stage == 3:
        block = largest_block_numel(model)
        config["zero_optimization"] |= {"stage3_max_live_parameters": 2 * block, "stage3_max_reuse_distance": block}
    engine = tiny.make_engine(model, config)
    rows, length = 2, 256
    ids = torch.randint(0, VOCABULARY, (rows, length), device=DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    for _ in range(2):
        tiny.train_step(engine, ids)
    peak = requested("peak") - before
    tokens = rows * length
    block_bytes = BYTES[kind] // LAYERS
    bound = BYTES[kind] + BESIDE + SLACK
    bound += (
        4 * 8 * trained + 4 * 4 * 65536 * 4
    )  # parameter, master, gradient, two moments, buckets (64 Ki at least), their copies
    bound += tokens * HIDDEN * 2 * LAYERS  # a checkpoint a block
    bound += tokens * 2 * (16 * HIDDEN + 8 * INNER)  # one block's activations
    bound += tokens * VOCABULARY * 4 * 6  # logits, their float32 copy, softmax, gradients
    bound += 3 * 2 * HIDDEN * INNER + (
        0 if kind == "bf16" else 4 * HIDDEN * INNER
    )  # one matrix decoded, and float32 on the way
    bound += 3 * block_bytes + 2 * VOCABULARY * HIDDEN * 2 if stage == 3 else 0  # gathered: two blocks and the head
    print(f"peak of a step: {kind} zero{stage} {peak:,} bytes, held {held:,}, bound {bound:,}")
    assert peak <= bound, f"{peak:,} bytes where the shapes say {bound:,}"
    if kind.startswith("nf4"):  # of so small a model the activations are half
        assert peak < BYTES["bf16"] + BESIDE, "a quantised model trained in the memory of a dense one"
    engine.destroy()
