"""A step that is not applied: what it counts as, whether it ends the run, and that a method's schedule learns nothing of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaModel

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_OK, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from dist_subspace.subspace import named_trainables
from tests.tiny_run import make_model, make_tokenizer
from tests.training.engines import config_of, stock
from tests.whole_runs import run_here

TEXTS = ["ab", "cde", "fghi", "jklmn"]
BROKEN, STEPS, RATE = 2, 4, 0.02
SETTINGS = {"init_rank": 3, "warmup_steps": 0, "final_steps": 0, "interval": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("skipped")
    make_model(path / "model", layers=1)
    (path / "train.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    return path


def configuration(base: Path, run: Path, **training: Any) -> dict[str, Any]:
    """Every step sees all samples, in two micro-batches: their order does not matter."""
    steps = {"max_steps": STEPS, "global_batch_size": 4, "per_device_train_batch_size": 2}
    rate = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    return {
        "model": {"path": str(base / "model"), "storage": "fp32"},
        "subspace": {"method": "adalora", "rank": 2, "options": SETTINGS, "constraint": "none"},
        "data": {"train": str(base / "train.jsonl"), "format": "text", "max_length": 8, "packing": False},
        "training": steps | rate | {"gradient_checkpointing": False} | training,
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 1},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


@contextmanager
def gradient_broken_in(step: int) -> Iterator[None]:
    """The loss is finite as ever, and the gradient of the last micro-batch of this step is not."""
    calls = 0

    def look(module: nn.Module, inputs: object, output: Any) -> None:
        nonlocal calls
        if isinstance(module, LlamaModel) and module.training:
            calls += 1
            if calls == 2 * step:
                output.last_hidden_state.register_hook(lambda gradient: gradient * math.inf)

    hook = register_module_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()


def importance_by_the_formula(base: Path) -> dict[str, Tensor]:
    """AdaLoRA's: `0.85 before + 0.15 |p g|`, with the weights after each step of torch's AdamW; no step is made, and nothing is
    learned, where the gradient is broken."""
    config = SubspaceConfig(method="adalora", rank=2, options=SETTINGS, constraint="none")
    model = attach(load_frozen(base / "model", storage="fp32"), config).train()
    named, tokenizer = named_trainables(model), make_tokenizer()
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    found = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(1, STEPS):  # in the last one scores are frozen
        if step == BROKEN:
            continue
        total: Any = 0.0
        for row in rows:
            ids = torch.tensor(row)
            total = total + cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        optimizer.zero_grad()
        (total / sum(len(row) - 1 for row in rows)).backward()
        optimizer.step()
        for name, p in named.items():
            assert p.grad is not None
            found[name] = 0.85 * found[name] + 0.15 * (p * p.grad).abs().detach()
    return found


def test_a_gradient_that_is_not_finite_is_a_skipped_step_of_which_a_schedule_learns_nothing(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with gradient_broken_in(BROKEN):
        assert run_here(configuration(base, tmp_path / "run")) == EXIT_OK
    state = read_trainer_state(tmp_path / "run" / f"checkpoint-{STEPS}")
    assert (state.skipped, state.overflowed, state.optimizer_steps) == (1, 0, STEPS - 1)
    said = f"warning: step {BROKEN} skipped: a gradient that is not finite (1 so far)"
    assert capfd.readouterr().out.count(said) == 1
    kept = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / "optimizer.safetensors")
    expected = importance_by_the_formula(base)
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(kept[f"{name}.importance"], value, rtol=1e-3, atol=1e-8, msg=name)


def test_a_gradient_that_is_not_finite_ends_a_run_that_shall_stop_there(base: Path, tmp_path: Path) -> None:
    with gradient_broken_in(BROKEN):
        assert run_here(configuration(base, tmp_path / "run", on_nonfinite="stop")) == EXIT_FAILED
    status = read_status(tmp_path / "run") or {}
    assert status["message"].startswith(
        f"step {BROKEN} has a gradient that is not finite, and training.on_nonfinite is stop"
    )
    assert (tmp_path / "run" / "checkpoint-1").is_dir() and not (tmp_path / "run" / "adapter").exists()


def test_a_loss_that_is_no_number_is_no_matter_of_the_fp16_scale(
    folder: Path,
    tmp_path: Path,
    fp16_on_a_cpu: None,
) -> None:
    config = config_of(folder, tmp_path / "run", stock(0, "fp16"), "fp16")
    config["training"] |= {"on_nonfinite": "stop", "max_steps": 2}

    def no_number(module: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(module, LlamaModel) and module.training:
            output.last_hidden_state.data.fill_(math.nan)

    hook = register_module_forward_hook(no_number)
    try:
        assert run_here(config) == EXIT_FAILED
    finally:
        hook.remove()
    assert (read_status(tmp_path / "run") or {})["message"].startswith(
        "step 1 has loss nan, and training.on_nonfinite is stop"
    )
