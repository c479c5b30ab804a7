"""The loss curve is drawn from whatever a run has logged so far."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy
import pytest
from numpy.typing import NDArray

from dist_subspace.errors import UsageError
from dist_subspace.report.curve import loss_curve, smoothed, spikes, title
from dist_subspace.run_folder.metrics import MetricsWriter
from dist_subspace.run_folder.records import Evaluation
from tests.step_records import step_record


def run_of(folder: Path, losses: list[float], eval_every: int = 0) -> Path:
    writer = MetricsWriter(folder)
    for step, loss in enumerate(losses, start=1):
        writer.write(step_record(step, loss=loss, learning_rate=1e-4 / step))
        if eval_every and step % eval_every == 0:
            writer.write(Evaluation(step, {"eval_loss": loss}))
    writer.close()
    return folder


def decay(count: int) -> list[float]:
    return [1 + 2 * math.exp(-5 * step / count) + 0.05 * math.sin(37 * step) for step in range(count)]


def colours(path: Path) -> set[int]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(numpy.int64)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 900
    return set(numpy.unique(pixels @ [1 << 16, 1 << 8, 1]).tolist())


TRAIN, EVAL, ODD, RATE = 0x1F5FA8, 0xD1495B, 0xE0A030, 0x5F6B76


def pixels_of(path: Path, colour: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Columns (from the left) and heights (from the bottom) of the pixels of this colour, but for those of the legend."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(numpy.int64) @ [1 << 16, 1 << 8, 1]
    rows, columns = numpy.nonzero(pixels == colour)
    beside = (columns < 0.6 * pixels.shape[1]) | (rows > 0.25 * len(pixels))
    return columns[beside], len(pixels) - rows[beside]


def test_losses_evaluations_and_rates_stand_at_their_steps_and_go_as_they_went(tmp_path: Path) -> None:
    """Lines are of steps that are not evenly apart; the loss falls, its evaluation rises, the rate rises and falls."""
    writer = MetricsWriter(tmp_path)
    for step, loss, rate in ((10, 5.0, 1.0), (20, 4.0, 3.0), (30, 3.0, 2.0), (90, 1.0, 1.0)):
        writer.write(step_record(step, loss=loss, learning_rate=rate))
    for step, loss in ((50, 1.5), (70, 3.0)):
        writer.write(Evaluation(step, {"eval_loss": loss}))
    writer.close()
    path = loss_curve(tmp_path)
    columns, heights = pixels_of(path, TRAIN)
    first, last = columns.min(), columns.max()
    assert heights[columns < first + 20].mean() > heights[columns > last - 20].mean() + 100
    rates, levels = pixels_of(path, RATE)
    assert rates.min() < first + 10 and rates[levels.argmax()] == pytest.approx(first + (last - first) / 8, abs=15)
    evaluated, rising = pixels_of(path, EVAL)
    wanted = [first + (last - first) * (step - 10) / 80 for step in (50, 70)]
    assert [evaluated.min(), evaluated.max()] == pytest.approx(wanted, abs=15)
    assert rising[evaluated < evaluated.min() + 5].mean() < rising[evaluated > evaluated.max() - 5].mean() - 50


def test_a_spike_neither_presses_the_curve_flat_nor_lifts_its_mean(tmp_path: Path) -> None:
    losses = decay(200)
    losses[60] = 4000.0
    columns, heights = pixels_of(loss_curve(run_of(tmp_path, losses)), TRAIN)
    assert heights.max() - heights.min() > 200
    assert columns[heights.argmax()] < columns.min() + 60, "the highest point is the first one"


@pytest.mark.parametrize("count", [1, 2, 60, 10_000])
def test_a_curve_of_any_length_is_drawn(tmp_path: Path, count: int) -> None:
    path = loss_curve(run_of(tmp_path, decay(count), eval_every=max(1, count // 4)))
    assert path == tmp_path / "loss.png" and {TRAIN, EVAL} <= colours(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_what_is_not_finite_and_what_is_far_beyond_is_marked(tmp_path: Path) -> None:
    losses = decay(100)
    assert ODD not in colours(loss_curve(run_of(tmp_path / "a", losses)))
    assert ODD in colours(loss_curve(run_of(tmp_path / "b", losses[:50] + [math.nan] + losses[51:])))
    assert ODD in colours(loss_curve(run_of(tmp_path / "c", losses[:50] + [4000.0] + losses[51:])))


@pytest.mark.parametrize("losses", [[math.nan], [math.nan] * 60, [2.0] * 60, [math.inf, 1.0]])
def test_a_run_without_a_usual_loss_is_drawn_too(tmp_path: Path, losses: list[float]) -> None:
    assert loss_curve(run_of(tmp_path, losses)).stat().st_size > 5000


def test_a_run_that_was_only_evaluated_is_drawn(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(Evaluation(0, {"eval_loss": 2.0}))
    writer.close()
    assert EVAL in colours(loss_curve(tmp_path))


def test_nothing_logged_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metrics\.jsonl with a step"):
        loss_curve(tmp_path)


def test_a_spike_takes_no_part_in_the_mean_and_an_early_fall_is_none() -> None:
    losses = numpy.array(decay(100))
    assert not spikes(losses).any()
    losses[50] = 4000.0
    assert numpy.flatnonzero(spikes(losses)).tolist() == [50]
    first = numpy.concatenate([[20.0], decay(60)])
    assert not spikes(first)[0]


def test_the_mean_is_centred_and_passes_over_what_is_not_finite() -> None:
    found = smoothed(numpy.array([1.0, 2.0, 3.0, numpy.nan, 5.0]), 3)
    assert found.tolist() == [1.5, 2.0, 2.5, 4.0, 5.0]
    assert numpy.isnan(smoothed(numpy.array([numpy.nan]), 3)).all()


def test_the_title_says_model_method_storage_and_stage(tmp_path: Path) -> None:
    assert title(tmp_path) == tmp_path.name
    (tmp_path / "config.yaml").write_text(
        "model: {path: meta-llama/Llama-3.1-8B, storage: nf4}\nsubspace: {method: lora, rank: 8}\n"
        "deepspeed: {preset: zero3}\n"
    )
    assert title(tmp_path) == "Llama-3.1-8B  ·  lora (rank 8)  ·  nf4  ·  zero3"
    for text in ("[1, 2]", "model: 3", "{", "model: {path: [}"):
        (tmp_path / "config.yaml").write_text(text)
        assert title(tmp_path) == tmp_path.name
