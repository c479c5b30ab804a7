"""What one training run of the odd tiny models needs: batches, engines, steps, and a look inside a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.placement.deepspeed.engine import initialize
from dist_subspace.placement.deepspeed.loss_scale import missing_scale
from dist_subspace.placement.deepspeed.presets import deepspeed_config
from dist_subspace.placement.tensors import full_numel, resident_bytes
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import trainable_parameters
from tests.tiny_models import ODD_VOCABULARY

VOCABULARY = ODD_VOCABULARY
BATCH, LENGTH = 4, 7
RATE = 1e-2
STEPS = 3


def global_batch(step: int) -> Tensor:
    """Token ids `(BATCH, LENGTH)` of a step, the same for any number of ranks."""
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 + step))


def own_batch(step: int, rank: int, world_size: int) -> Tensor:
    share = BATCH // world_size
    return global_batch(step)[rank * share : (rank + 1) * share]


def ds_config(stage: int, *, trainable_numel: int = 0, world_size: int = 1, **zero: Any) -> dict[str, Any]:
    """The preset of a stage with every ZeRO-3 threshold at 0, and entries of `zero_optimization` to change."""
    config = deepspeed_config(
        f"zero{stage}",
        micro_batch=BATCH // world_size,
        rounds=1,
        world_size=world_size,
        trainable_numel=trainable_numel,
        block_numel=0,
        max_grad_norm=0.0,
    )
    config["zero_optimization"] |= zero
    return config


def make_engine(model: nn.Module, config: dict[str, Any], optimizer: Any = None) -> Any:
    made = (optimizer or adam)(trainable_parameters(model), lr=RATE)
    return initialize(model, made, config)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Adam whose first steps are not mere signs: a gradient of the wrong size shows, and rounding is not blown up."""
    return torch.optim.AdamW(parameters, lr=lr, eps=1e-3)


def train_step(engine: Any, ids: Tensor) -> float:
    """One step of a DeepSpeed engine, as our loop makes it; the loss of this rank's rows."""
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss * missing_scale(engine))
    engine.step()
    return float(loss.detach())


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def whole_bytes(parameters: dict[str, nn.Parameter]) -> int:
    return sum(full_numel(p) * p.element_size() for p in parameters.values())


def shard_bytes(parameters: dict[str, nn.Parameter], world_size: int) -> int:
    """What a rank keeps when each parameter is split evenly, rounded up."""
    return sum(-(-full_numel(p) // world_size) * p.element_size() for p in parameters.values())


class Watch:
    """Looks inside a step: at every product of a frozen operator, whether its tensors are whole, and how many frozen bytes
    lie on this rank."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(frozen_parameters(model).values())
        self.peak = 0
        self.forwards = self.backwards = self.broken = 0
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                self._watch(module)

    def _watch(self, module: FrozenLinear) -> None:
        for name in ("product", "gated_product"):
            setattr(module, name, self._seen(module, getattr(module, name), backward=False))
        for name in ("transposed_product", "gated_gradients"):
            setattr(module, name, self._seen(module, getattr(module, name), backward=True))

    def _seen(self, module: FrozenLinear, pass_through: Callable[..., Any], backward: bool) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self.forwards += not backward
            self.backwards += backward
            self._look(module)
            return pass_through(*args)

        return watched

    def _look(self, module: FrozenLinear) -> None:
        self.broken += sum(p.numel() != full_numel(p) for p in module.parameters(recurse=False))
        self.peak = max(self.peak, resident_bytes(self.parameters))
