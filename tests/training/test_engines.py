"""Whatever engine a stock JSON or a preset asks for: it trains alike, its first checkpoint can be written, and it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training import optimizers
from dist_subspace.training.loss import summed_loss
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd
from tests.training.engines import close, config_of, global_batch, micro_batch, stepper_of, stock
from tests.whole_runs import losses, run_here


def norms(run: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_saved_and_resumed(config: dict[str, Any], ranks: int) -> tuple[list[float], list[float]]:
    """The run, and again from its middle, bit for bit alike; its losses and norms."""
    run = Path(config["run"]["output_dir"])

    def go() -> list[int]:
        return [run_here(config)] if ranks == 1 else run_on_ranks(ranks, run_here, config)

    assert go() == [EXIT_OK] * ranks, read_status(run)
    curve, found = losses(run), norms(run)
    shutil.rmtree(run / "checkpoint-4")
    assert go() == [EXIT_OK] * ranks, read_status(run)
    assert losses(run) == curve and norms(run) == found and len(curve) == 4
    return curve, found


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_16_bit_engine_trains_alike_with_and_without_zero_and_resumes(
    kind: str, optim: str, folder: Path, tmp_path: Path, fp16_on_a_cpu: None
) -> None:
    split, whole = (
        check_saved_and_resumed(config_of(folder, tmp_path / str(stage), stock(stage, kind), kind, optim), 1)
        for stage in (1, 0)
    )
    assert whole[0] == pytest.approx(split[0], rel=2e-4) and whole[1] == pytest.approx(split[1], rel=2e-3)


def test_a_loss_scale_that_is_too_large_is_lowered_without_zero_too(
    folder: Path, tmp_path: Path, fp16_on_a_cpu: None
) -> None:
    engine = stock(0, "fp16")
    engine["fp16"]["initial_scale_power"] = 22
    config = config_of(folder, tmp_path / "run", engine, "fp16")
    config["training"] |= {"max_steps": 12, "on_nonfinite": "stop"}  # which is not about the scale
    assert run_here(config) == EXIT_OK
    skipped = (read_status(tmp_path / "run") or {})["skipped"]
    state = read_trainer_state(tmp_path / "run" / "checkpoint-12")
    assert (state.skipped, state.overflowed) == (0, skipped)
    assert 0 < skipped < 12 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optim", sorted(optimizers.ON_ANY_DEVICE))
@pytest.mark.parametrize("kind", [None, "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_engine_saves_and_resumes(
    stage: int, kind: str | None, optim: str, ranks: int, folder: Path, tmp_path: Path, fp16_on_a_cpu: None
) -> None:
    if kind == "fp16" and ranks > 1:
        pytest.skip("the other processes' accelerator has no fp16 engine")
    check_saved_and_resumed(config_of(folder, tmp_path / "run", stock(stage, kind), kind, optim), ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload", "more"),
    [
        (1, ("offload_optimizer",), {}),
        (2, ("offload_optimizer",), {}),
        (3, ("offload_optimizer", "offload_param"), {}),
        (1, (), {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, (), {"data_types": {"grad_accum_dtype": "fp32"}}),
        (1, ("offload_optimizer",), {"data_types": {"grad_accum_dtype": "fp32"}}),
    ],
)
def test_offload_and_float32_accumulation_save_and_resume(
    stage: int, offload: tuple[str, ...], more: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "run", stock(stage, "bf16", *offload, **more), "bf16")
    check_saved_and_resumed(config, 2)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        (
            "fp16",
            {},
            "fp16.enabled is true, but DeepSpeed has no fp16 engine on this device (cpu); accepted: fp16.enabled false",
        ),
        ("bf16", {"data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype is 'fp32' at ZeRO stage 0"),
        (None, {"data_types": {"grad_accum_dtype": "bf16"}}, "accepted: float32, or a stage above 0"),
    ],
)
def test_an_engine_that_deepspeed_does_not_have_is_refused_before_the_model_is_read(
    kind: str | None,
    more: dict[str, Any],
    words: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # as most CPUs say
    config = config_of(folder, tmp_path / "run", stock(0, kind, **more), kind)
    assert run_here(config) == EXIT_USAGE
    said = capfd.readouterr()
    assert words in said.err and "reading the model: done" not in said.out


class Forgetful(torch.optim.SGD):
    """Keeps something of the first parameter alone, as L-BFGS does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        first = self.param_groups[0]["params"][0]
        self.state[first]["history"] = torch.zeros(8)


def test_a_checkpoint_that_could_not_be_written_is_found_out_after_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimizers.ON_ANY_DEVICE, "sgd", lambda groups, settings: Forgetful(groups, lr=0.1))  # type: ignore[arg-type]
    config = config_of(folder, tmp_path / "run", stock(0, None), None, "sgd")
    assert run_here(config) == EXIT_FAILED
    status = read_status(tmp_path / "run") or {}
    assert "no checkpoint of this run could be written: the state of training.optim 'sgd'" in status["message"]
    assert losses(tmp_path / "run") == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def norm_of_a_step(folder: str, stage: int) -> float | None:
    batch = global_batch(3)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    assert engine.grad_norm is None
    stepper.accumulate(batch)
    assert engine.step(True)
    close(engine)
    return engine.grad_norm


def torchs_own(folder: str) -> float:
    """The norm of the mean gradient over all targets, in plain torch."""
    model = attach(load_frozen(folder, storage="nf4", dtype="float32"), SubspaceConfig(method="lora", rank=3)).train()
    micro = [micro_batch(number) for number in range(3)]
    total: Tensor = sum(summed_loss(model(**m.inputs).logits, m.labels) for m in micro)  # type: ignore[assignment]
    (total / sum(m.targets for m in micro)).backward()
    return float(torch.nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0))


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_the_logged_gradient_norm_is_torchs_at_every_stage(stage: int, ranks: int, llama: str) -> None:
    expected = run_on_ranks(1, torchs_own, llama)[0]
    assert run_on_ranks(ranks, norm_of_a_step, llama, stage) == pytest.approx([expected] * ranks, rel=1e-5)
