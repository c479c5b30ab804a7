"""A run up to its first step, as `train` makes it: the configuration read from YAML text, the plan, the model with its method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dist_subspace.config import load_config
from dist_subspace.notices import heard
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.training.data import MicroBatch, eval_batches
from dist_subspace.training.display import Display
from dist_subspace.training.model import make_model
from dist_subspace.training.observer import Observer
from dist_subspace.training.plan import Plan, make_plan
from tests.keys.bench import Bench

Row = tuple[list[int], list[int]]
"""Token ids of a sample without padding, and their labels."""


@dataclass
class Begun:
    """plan: of the run; said: the sentences that it has for its user."""

    plan: Plan
    said: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        """The model with its method, in training mode."""
        with heard(self.said.append):
            return make_model(self.plan, Observer(Display(False, 1), None, None, self.plan.device))

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """All of a step, which is an epoch where the configuration says `training.global_batch_size: null`."""
        return [micro for micro in self.plan.batches.batch(0).rounds if micro is not None]

    @property
    def rows(self) -> list[Row]:
        """The samples of an epoch, as the model is given them, in their order."""
        return [row for micro in self.micro_batches for row in rows_of(micro)]

    @property
    def held_out(self) -> list[Row]:
        assert self.plan.data.eval is not None
        found = eval_batches(self.plan.data.eval, rank=0, world_size=1, micro_batch_size=2, pad_id=self.plan.pad_id)
        return [row for micro in found if micro is not None for row in rows_of(micro)]


def begin(bench: Bench, changes: Mapping[str, Any]) -> Begun:
    """A step is an epoch, in micro-batches of one sample, if the changes say nothing else."""
    usual = {"training.global_batch_size": None, "training.per_device_train_batch_size": 1}
    tree = bench.configuration({**usual, **changes})
    file = Path(tree["run"]["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    ensure_process_group()
    said: list[str] = []
    return Begun(make_plan(load_config(file), said.append), said)


def rows_of(micro: MicroBatch) -> Iterator[Row]:
    """A micro-batch's samples: what the mask shows of a row, or what stands between two begins of positions."""
    ids, labels = micro.inputs["input_ids"], micro.labels
    mask = micro.inputs.get("attention_mask")
    for number, row in enumerate(ids):
        if mask is None:
            starts = [place for place, value in enumerate(micro.inputs["position_ids"][number].tolist()) if value == 0]
            for start, end in pairwise([*starts, len(row)]):
                yield row[start:end].tolist(), labels[number, start:end].tolist()
        else:
            kept = mask[number].bool()
            yield (
                row[kept].tolist(),
                (labels[number, kept] if labels.dim() == 2 else labels[number : number + 1]).tolist(),
            )


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """Of a model in evaluation; it is left there."""
    found: Tensor = model.eval()(input_ids=ids, **inputs).logits
    return found


def randomised(model: nn.Module) -> nn.Module:
    """The model with other values in all that is trained, B of LoRA among them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
