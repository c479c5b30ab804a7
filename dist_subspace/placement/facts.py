"""What a configuration says about training, as far as an engine is configured by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the YAML says, as far as a DeepSpeed JSON can say it too.

    rounds: micro-batches of a rank in one step, empty ones included: ceil(global_batch / micro_batch / world_size).
    warmup_steps, total_steps: whole steps, ratios and epochs resolved. dtype: the computation's type, as float32.
    optim, lr_scheduler_type: None where the YAML leaves them open; then the JSON's are not compared.
    trainable_numel, block_numel: as in `thresholds.zero_thresholds`. ranks_per_node: where a preset asks for it.
    """

    micro_batch: int
    global_batch: int
    rounds: int
    world_size: int
    max_grad_norm: float
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    warmup_steps: int
    total_steps: int
    dtype: str
    trainable_numel: int = 0
    block_numel: int = 0
    optim: str | None = None
    lr_scheduler_type: str | None = None
    ranks_per_node: int | None = None
