"""README's table of memory by model and number of cards, computed as the headers of the recipes are."""

from __future__ import annotations

import functools

from dist_subspace.config import Config
from tests.config.recipes import GIB, Sizes, held, peak, sizes_for

MODELS = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "32B": "Qwen/Qwen3-32B",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
}
STORAGES = ("nf4", "int8", "bf16")
GPUS = (1, 2, 4, 8)
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GB, as they are sold
ROOM = 0.9  # of a card: the estimate leaves a tenth to what it does not know, as the recipes do


def memory_rows() -> list[tuple[str, ...]]:
    """Of each model and storage: the peak of a card on 1, 2, 4 and 8 of them, and the smallest card that has room for it."""
    return [
        (name, f"`{storage}`", *(_cell(peak_of(model, storage, gpus)) for gpus in GPUS))
        for name, model in MODELS.items()
        for storage in STORAGES
    ]


def peak_of(model: str, storage: str, gpus: int) -> float:
    """Bytes: LoRA of rank 16 on all linear layers, a row of 2,048 tokens a card, split by ZeRO-3 where there are several."""
    config, sizes = _asked(model, storage, gpus), _sizes(model, storage)
    return peak(config, sizes, held(sizes, config.deepspeed.preset, gpus, gpus))


@functools.cache
def _sizes(model: str, storage: str) -> Sizes:
    return sizes_for(_asked(model, storage, 1))


def _asked(model: str, storage: str, gpus: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "storage": storage, "double_quant": storage == "nf4", "dtype": "bfloat16"},
            "subspace": {"method": "lora", "rank": 16, "target_modules": "all-linear"},
            "data": {"train": "train.jsonl", "max_length": 2048},
            "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "deepspeed": {"preset": "zero3" if gpus > 1 else "zero0"},
        }
    )


def _cell(size: float) -> str:
    fits = [card for card in CARDS if size < ROOM * card * GIB]
    return f"{size / GIB:.1f} ({fits[0]} GB)" if fits else "-"
