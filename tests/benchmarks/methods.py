"""Every method's training step beside our LoRA's, and beside PEFT's own where PEFT has the method.

    python -m tests.benchmarks.methods [--threads 2] [--rounds 9] [--blocks 6] [--storages bf16 nf4] [--only dora pissa ...]
        [--peft dora ...] [--peft-rounds 9]

The random LLaMA of tests/benchmarks/speed_models.py (hidden 1024, 2 x 256 tokens, bfloat16; with storage fp32, float32), rank
16, every linear of the blocks unless the method has targets of its own. PEFT's bfloat16 steps are torch's: on a CPU without
such products one takes minutes, so `--peft` names the rows that are to be compared with it (with none after it: no row). A
step is forward, loss and backward, without an optimizer and without activation checkpointing; sides alternate, each round
gives one ratio; the median and quartiles are printed. "memory" is the peak of live tensor bytes inside a step over LoRA's
(tests/benchmarks/memory.py): of the step as it is timed, and with activation checkpointing, which the product's loop has on.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.benchmarks import speed_models as models
from tests.benchmarks.memory import peak_bytes
from tests.benchmarks.speed import CLOCKS, compare

RANK = 16
SMALL_SPECTRUM = 1024 // 16

# name of a row -> (method, its settings beside the defaults)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora, dropout 0.05": ("dora", {"dropout": 0.05}),
    "lora, dropout 0.05": ("lora", {"dropout": 0.05}),
    "lora, mpc_o": ("lora", {"constraint": "mpc_o"}),
    "lora, mpc_n": ("lora", {"constraint": "mpc_n"}),
    "sam-parser, d/16": ("sam-parser", {"options": {"top_k": SMALL_SPECTRUM}}),
    "svdiff, d/16": ("svdiff", {"options": {"top_k": SMALL_SPECTRUM}}),
    "liera, exp": ("liera", {"options": {"form": "exp"}}),
}
TARGETS: Mapping[str, float] = {"dora": 1.10, "ssl": 1.0, "ssb": 1.0, "ia3": 1.0}
OTHERS = 1.25
STATED = (
    "dora, dropout 0.05",
    "sam-parser",
    "svdiff",
    "liera",
    "liera, exp",
)  # no target; the number is what is asked for


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    return {**{name: (name, {}) for name in dsub.methods()}, **ROWS}


def ours(storage: str, method: str, settings: Mapping[str, Any], blocks: int = 6) -> nn.Module:
    rank = RANK if dsub.methods()[method].uses_rank else None
    model = models.frozen(storage, blocks)
    return dsub.attach(model, dsub.SubspaceConfig(method=method, rank=rank, **settings)).train()


def peft_config(method: str, settings: Mapping[str, Any]) -> Any | None:
    """PEFT's configuration of the same method, or None."""
    dropout = settings.get("dropout", 0.0)
    if settings.get("constraint") or settings.get("options"):
        return None
    lora: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": models.LINEARS,
        "lora_dropout": dropout,
    }
    tokens: dict[str, Any] = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}
    made: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**lora, init_lora_weights="pissa_niter_4"),
        "olora": lambda: peft.LoraConfig(**lora, init_lora_weights="olora"),
        "adalora": lambda: peft.AdaLoraConfig(
            target_modules=models.LINEARS, target_r=RANK, init_r=RANK * 3 // 2, total_step=100
        ),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "up_proj"], feedforward_modules=[]),
        "vera": lambda: peft.VeraConfig(r=RANK, target_modules=models.LINEARS),
        "prompt": lambda: peft.PromptTuningConfig(**tokens),
        "p-tuning": lambda: peft.PromptEncoderConfig(**tokens),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
    }
    return made[method]() if method in made else None


def peft_model(storage: str, config: Any, blocks: int = 6) -> nn.Module:
    model = models.random_llama(models.computed_in(storage), blocks)
    for name, module in list(model.named_modules()):
        if storage == "nf4" and name.rpartition(".")[2] in models.LINEARS:
            models.storages.replace(model, name, models.four_bit(module))
    if storage == "nf4":
        model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, config).train()


def peaks(model: Any) -> tuple[int, int]:
    """Live bytes of a step as it is timed, and with activation checkpointing."""
    step = models.step_of(model)
    plain = peak_bytes(step)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = peak_bytes(step)
    model.gradient_checkpointing_disable()
    return plain, checkpointed


def measure(name: str, storage: str, arguments: argparse.Namespace) -> None:
    method, settings = rows()[name]
    clock, blocks = CLOCKS[arguments.clock], arguments.blocks
    try:
        model = ours(storage, method, settings, blocks)
    except UsageError as refusal:
        print(f"{storage:5s} {name:20s} refused: {refusal}", flush=True)
        return
    beside = ours(storage, "lora", {}, blocks)
    plain, checkpointed = (mine / other for mine, other in zip(peaks(model), peaks(beside), strict=True))
    step, lora = models.step_of(model), models.step_of(beside)
    goal = TARGETS.get(name, OTHERS)
    result = compare(name, step, lora, arguments.rounds, goal, clock)
    trained = sum(p.numel() for p in dsub.trainable_parameters(model))
    line = f"{storage:5s} {name:20s} {trained:>10,} trained  {result.ours_ms:8.1f} ms  x LoRA {result.ratio:.3f} "
    line += f"[{result.low:.3f}, {result.high:.3f}] target {'stated' if name in STATED else f'{goal:.2f}'}  "
    line += f"memory {plain:.3f} / {checkpointed:.3f}"
    del lora, beside
    gc.collect()
    config = peft_config(method, settings)
    if config is not None and name in arguments.peft:
        try:
            theirs = models.step_of(peft_model(storage, config, blocks))
            theirs()
        except Exception as error:
            line += f"  PEFT fails ({type(error).__name__}: {str(error).splitlines()[0][:60]})"
        else:
            against = compare(name, step, theirs, arguments.peft_rounds or arguments.rounds, 1.0, clock)
            line += f"  x PEFT {against.ratio:.3f} [{against.low:.3f}, {against.high:.3f}]"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--storages", nargs="*", default=["bf16", "nf4"])
    parser.add_argument("--only", nargs="*", choices=sorted(rows()), default=list(rows()))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--peft", nargs="*", choices=sorted(rows()), default=list(rows()))
    parser.add_argument("--peft-rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for storage in arguments.storages:
        for name in arguments.only:
            measure(name, storage, arguments)
            gc.collect()


if __name__ == "__main__":
    main()
