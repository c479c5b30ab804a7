"""Keys of `training` that choose and set the optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from dist_subspace.run_folder.status import EXIT_USAGE
from tests.keys.bench import Bench, Outcome
from tests.keys.reference import adamw, assert_follows, decaying, differ, train_plainly
from tests.keys.table import Key

ON_A_CPU = {
    "adamw_torch": adamw,
    "adamw_torch_fused": partial(adamw, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}
# LoRA's declared rate for the narrowest models, times √8, because the bench's α is 4 and LoRA's own 32.
OWN_RATE = 0.0085


def _follows(bench: Bench, changes: dict[str, Any], **reference: Any) -> Outcome:
    """The changed run goes the reference's way, and that is another than the unchanged run's."""
    outcome = bench.run(changes)
    assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on, **reference))
    assert differ(outcome, bench.usual())
    return outcome


def optim(bench: Bench) -> None:
    assert_follows(bench.usual(), train_plainly(bench.peft_model(), bench.usual().trained_on))
    for name, made in ON_A_CPU.items():
        if name != "adamw_torch":
            _follows(bench, {"training.optim": name, "training.max_steps": 3}, optimizer=made)
    if not torch.cuda.is_available():
        outcome = bench.run({"training.optim": "adamw_bnb_8bit"}, EXIT_USAGE)
        assert outcome.message.startswith("training.optim is 'adamw_bnb_8bit'") and outcome.calls == []


def learning_rate(bench: Bench) -> None:
    _follows(bench, {"training.learning_rate": 0.003}, optimizer=partial(adamw, lr=0.003))
    outcome = _follows(bench, {"training.learning_rate": "auto"}, optimizer=partial(adamw, lr=OWN_RATE))
    assert outcome.config["training"]["learning_rate"] == OWN_RATE
    assert f"training.learning_rate is auto: {OWN_RATE}, the rate of method lora for 32 inputs" in outcome.said


def adam_beta1(bench: Bench) -> None:
    _follows(bench, {"training.adam_beta1": 0.5}, optimizer=partial(adamw, betas=(0.5, 0.999)))


def adam_beta2(bench: Bench) -> None:
    _follows(bench, {"training.adam_beta2": 0.7}, optimizer=partial(adamw, betas=(0.9, 0.7)))


def adam_epsilon(bench: Bench) -> None:
    _follows(bench, {"training.adam_epsilon": 0.01}, optimizer=partial(adamw, eps=0.01))


def weight_decay(bench: Bench) -> None:
    _follows(bench, {"training.weight_decay": 0.5}, optimizer=decaying)
    changes = {"training.weight_decay": 0.5, "training.optim": "sgd"}
    _follows(bench, changes, optimizer=partial(decaying, kind=torch.optim.SGD))
    _nothing_decays_before_the_first_step(bench)


def _nothing_decays_before_the_first_step(bench: Bench) -> None:
    """DeepSpeed's bf16 engine makes a step of its own as it starts; the run's first one has the rate 0 here."""
    changes = {
        "model.storage": "bf16",
        "deepspeed.config": {"bf16": {"enabled": True}},
        "training.max_steps": 1,
        "training.lr_scheduler_type": "constant_with_warmup",
        "training.warmup_steps": 1,
        "training.weight_decay": 10.0,
    }
    found, start = bench.run(changes).adapter, load_file(bench.folder / "start" / "adapter_model.safetensors")
    assert found.keys() == start.keys()
    for name, tensor in start.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=2**-7, atol=1e-6)  # bfloat16's rounding


def max_grad_norm(bench: Bench) -> None:
    for norm in (0.1, 0.0):  # every gradient's norm is above the first; the base configuration does not clip
        changes = {"training.max_grad_norm": norm, "training.optim": "sgd"}
        outcome = _follows(bench, changes, optimizer=ON_A_CPU["sgd"], max_grad_norm=norm)
        assert min(step["grad_norm"] for step in outcome.steps) > 0.1, "what is logged is the norm before clipping"


KEYS = [
    Key(
        "training.optim", tuple(ON_A_CPU), "the optimizer", "torch.optim; transformers' Trainer (names of GPUs)", optim
    ),
    Key("training.learning_rate", (0.003, "auto"), "the rate of every step", "torch.optim.AdamW", learning_rate),
    Key("training.adam_beta1", (0.5,), "decay of the mean gradient", "torch.optim.AdamW", adam_beta1),
    Key("training.adam_beta2", (0.7,), "decay of the squared gradient", "torch.optim.AdamW", adam_beta2),
    Key("training.adam_epsilon", (0.01,), "what is added to the root", "torch.optim.AdamW", adam_epsilon),
    Key(
        "training.weight_decay",
        (0.5,),
        "decay of matrices, never of one-dimensional parameters",
        "torch.optim.AdamW and SGD with two groups",
        weight_decay,
    ),
    Key(
        "training.max_grad_norm",
        (0.1, 0),
        "the update of a gradient above it; 0: nothing is clipped",
        "torch.nn.utils.clip_grad_norm_",
        max_grad_norm,
    ),
]
