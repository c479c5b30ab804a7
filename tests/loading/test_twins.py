"""Two tensors of a file that may be one parameter: each rank reads its rows of them, and all decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dist_subspace import load_frozen
from dist_subspace.loading.load import bytes_read
from dist_subspace.placement.collectives import world
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def loaded(folder: str) -> tuple[bool, int]:
    """Whether embedding and head are one parameter, and the bytes that were read."""
    model = load_frozen(folder, "bf16", deepspeed=tiny.ds_config(3, world_size=world().size))
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight, bytes_read(model)  # type: ignore[operator]


@pytest.mark.parametrize("row", [None, 0, -1])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_row_that_differs_keeps_them_apart_whoever_sees_it(row: int | None, ranks: int, tmp_path: Path) -> None:
    config = tiny_config("LlamaConfig", vocab_size=500, num_hidden_layers=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if row is not None:
        tensors[HEAD][row] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    found = run_on_ranks(ranks, loaded, str(tmp_path))
    assert [tied for tied, _ in found] == [row is None] * ranks
    read, compared = sum(count for _, count in found), 2 * tensors[HEAD].nbytes
    assert read <= 1.05 * size + compared - (tensors[HEAD].nbytes if row is None else 0)
