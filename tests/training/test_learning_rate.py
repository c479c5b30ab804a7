"""The rate that a run trains at: given, its checkpoint's, or the method's own; and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_subspace.config import Config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.status import EXIT_OK
from dist_subspace.run_folder.trainer_state import TrainerState
from dist_subspace.subspace import SubspaceConfig, resolve, suggested_rate
from dist_subspace.training import learning_rate
from dist_subspace.training.learning_rate import ChosenRate, adapted_width, choose_rate, with_rate
from dist_subspace.training.run import train
from tests.tiny_models import tiny_config

WIDTHS = {"layers.0.q_proj": 32, "layers.0.k_proj": 32, "layers.0.up_proj": 32, "layers.0.down_proj": 44}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder without weights: a LLaMA of width 32."""
    tiny_config("LlamaConfig", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configuration(**training: Any) -> Config:
    return load_config({"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "training": training})


def chosen(model: Path, method: str = "ssb", checkpoint: Any = None, **training: Any) -> ChosenRate:
    return choose_rate(configuration(**training), resolve(SubspaceConfig(method=method)), model, checkpoint)


def state(**training: Any) -> TrainerState:
    return TrainerState(2, 20, 200, 1.0, 2, {}, {}, training=training)


@pytest.mark.parametrize("method", ["lora", "ssb", "prompt", "pfeiffer"])
def test_auto_is_the_methods_own_rate_and_says_so_in_one_line(model: Path, method: str) -> None:
    found, own = chosen(model, method), suggested_rate(SubspaceConfig(method=method), 32)
    assert (found.rate, found.warning) == (own.rate, None)
    assert found.said == f"training.learning_rate is auto: {own.rate:g}, {own.why}" and "\n" not in found.said
    assert f"method {method} for 32 inputs" in found.said


def test_auto_of_a_run_that_goes_on_is_the_checkpoints_rate(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-2"
    found = chosen(model, checkpoint=(folder, state(learning_rate=0.0123)))
    assert (found.rate, found.said) == (0.0123, "training.learning_rate is auto: 0.0123, as in checkpoint-2")
    folder.mkdir(parents=True)  # of a version whose checkpoints did not hold it: the run's config.yaml does
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {path: m}\ndata: {train: t.jsonl}\ntraining: {learning_rate: 0.0002}\n"
    )
    assert chosen(model, checkpoint=(folder, state())).rate == 0.0002


def test_a_rate_that_was_given_stays_also_where_a_run_goes_on(model: Path, tmp_path: Path) -> None:
    checkpoint = (tmp_path / "run" / "checkpoint-2", state(learning_rate=0.0123))
    for before in (None, checkpoint):
        assert chosen(model, checkpoint=before, learning_rate=0.05) == ChosenRate(0.05, chosen(model).own)


def test_a_rate_far_from_the_methods_own_is_said_with_that_one_and_what_may_come_of_it(model: Path) -> None:
    own = chosen(model).rate
    low, high = chosen(model, learning_rate=own / 50), chosen(model, learning_rate=own * 50)
    assert low.warning and f"50 times below {own:g}, the rate of method ssb" in low.warning
    assert "may learn nothing" in low.warning and low.rate == own / 50
    assert high.warning and f"50 times {own:g}, the rate" in high.warning and "may diverge" in high.warning
    assert chosen(model, learning_rate=own * 5).warning is None


def test_an_objective_of_preferences_trains_at_a_twentieth_as_trls_defaults(model: Path) -> None:
    sft, dpo = chosen(model), chosen(model, objective="dpo")
    assert dpo.rate == pytest.approx(sft.rate / 20, rel=0.05) and "training.objective dpo" in str(dpo.said)
    assert chosen(model, objective="dpo", learning_rate=sft.rate).warning


def test_the_number_takes_the_place_of_auto_and_nothing_else_changes() -> None:
    config = configuration(max_steps=7)
    settled = with_rate(config, 0.5)
    assert settled.training.rate == 0.5 and config.training.learning_rate == "auto"
    assert with_rate(settled, 0.25).model_dump() == with_rate(config, 0.25).model_dump()


@pytest.mark.parametrize(
    "given, width",
    [
        ({"target_modules": ["down_proj"]}, 44),
        ({"target_modules": r"layers\.\d+\.down_proj"}, 44),
        ({"target_modules": ["q_proj", "down_proj"]}, 32),  # as many of either: the smaller one
        ({"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["q_proj"]}, 44),
        ({"target_modules": r"layers\.9\.down_proj"}, 32),  # of a block that is not there: all stand for it
        ({"target_modules": "all-linear"}, 32),
        ({"method": "prompt"}, 32),
    ],
    ids=str,
)
def test_the_width_is_that_of_most_adapted_layers(given: dict[str, Any], width: int) -> None:
    assert adapted_width(WIDTHS, resolve(SubspaceConfig(**given))) == width


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop", "lion_8bit"])
def test_rates_are_those_of_adamw_so_another_optimizer_needs_a_number(model: Path, optim: str) -> None:
    with pytest.raises(UsageError, match=f"auto, but training.optim is '{optim}'.*accepted: a number above 0"):
        chosen(model, optim=optim)
    assert chosen(model, optim=optim, learning_rate=1e-9) == ChosenRate(1e-9, None)
    assert chosen(model, optim="paged_adamw_8bit").rate == chosen(model).rate


def test_a_model_whose_width_nobody_knows_needs_a_number(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "model_widths", lambda *of: {})
    assert chosen(model, learning_rate=1e-9) == ChosenRate(1e-9, None)
    with pytest.raises(UsageError, match=r"auto, but no layer.*accepted: a number above 0"):
        chosen(model)


def of_a_run(folder: Path, run: Path, steps: int, **training: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "ssb"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 64, "cache_dir": str(folder / "tokens")},
        "training": {"max_steps": steps, "global_batch_size": 2, **training},
        "deepspeed": {"preset": "none"},
        "run": {"output_dir": str(run), "report_to": "none"},
    }


def test_a_run_writes_the_number_and_goes_on_with_it(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def written() -> Any:
        return yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["learning_rate"]

    assert train(of_a_run(folder, tmp_path, 1)) == EXIT_OK
    own = suggested_rate(SubspaceConfig(method="ssb"), 32).rate
    assert (
        written() == own
        and f"training.learning_rate is auto: {own:g}, the rate of method ssb" in capfd.readouterr().out
    )
    assert train(of_a_run(folder, tmp_path, 2, learning_rate=own / 20)) == EXIT_OK
    assert written() == own / 20 and "warning: training.learning_rate is" in capfd.readouterr().out
    assert train(of_a_run(folder, tmp_path, 3, learning_rate="auto")) == EXIT_OK
    said = capfd.readouterr().out
    assert written() == own / 20 and f"training.learning_rate is auto: {own / 20:g}, as in checkpoint-2" in said
    assert "training.learning_rate is 0" not in said, "nothing has changed"
