"""`inspect`: what is said of an adapter, from its files alone, and the picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import imread
from safetensors.torch import load_file

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS
from dist_subspace.report.adapter import adapter_report, adapter_text
from dist_subspace.report.adapter_picture import adapter_picture
from dist_subspace.training.run import train
from tests.interchange.trained import saved_adapter
from tests.tiny_run import make_model, make_records


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_it_says_what_the_adapter_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_adapter("pissa", tmp_path, options={"svd": "exact"})
    found = json.loads(inspected(capsys, str(tmp_path), "--json"))
    trained = sum(p.numel() for p in dsub.trainable_parameters(model))
    expected = {"method": "pissa", "reference": "2404.02948", "rank": 4, "alpha": 4.0, "options": {"svd": "exact"}}
    expected |= {"layers": 8, "parameters": trained, "values_in_the_file": 2 * trained, "peft_type": None}
    assert {key: found[key] for key in expected} == expected
    assert found["bytes"] == (tmp_path / WEIGHTS).stat().st_size
    assert {row["module"]: row["layers"] for row in found["by_module"]} == {
        "c_attn": 2,
        "attn.c_proj": 2,
        "c_fc": 2,
        "mlp.c_proj": 2,
    }
    text = inspected(capsys, str(tmp_path))
    for words in ("pissa  (reconstruction, mode 2, arXiv 2404.02948)", "rank 4, alpha 4, svd=exact", "effective rank"):
        assert words in text
    assert f"{trained:,} values in 8 layers, {trained:,} frozen ones beside them" in text


def test_layers_are_ranked_by_how_far_they_moved(tmp_path: Path) -> None:
    model = saved_adapter("lora", tmp_path)
    model.transformer.h[1].mlp.c_fc.lora_B.data.mul_(50)
    dsub.save_adapter(model, tmp_path)
    found = adapter_report(tmp_path)
    row = next(r for r in found["by_module"] if r["module"] == "c_fc")
    assert row["most_layer"] == "transformer.h.1.mlp.c_fc"
    parts = [block.mlp.c_fc for block in model.transformer.h]
    norms = [float((part.scale * part.lora_B @ part.lora_A).norm().detach()) for part in parts]
    assert row["norm"] == pytest.approx(sum(norms) / 2, rel=1e-4) and row["most"] == pytest.approx(norms[1], rel=1e-4)
    lines = adapter_text(found, 100).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("moved most"))
    assert lines[start + 1].startswith("transformer.h.1.mlp.c_fc")
    norms = [float(line.split()[1]) for line in lines[start + 1 : start + 9]]
    assert norms == sorted(norms, reverse=True)


def test_a_module_that_was_trained_in_full_counts_among_the_trained_values(tmp_path: Path) -> None:
    model = saved_adapter("lora", tmp_path, "BertForSequenceClassification", modules_to_save=["classifier"])
    trained = sum(p.numel() for p in dsub.trainable_parameters(model))
    assert trained > sum(model.classifier.weight.shape)
    assert adapter_report(tmp_path)["parameters"] == adapter_report(tmp_path)["values_in_the_file"] == trained


def test_no_line_is_longer_than_the_terminal(tmp_path: Path) -> None:
    saved_adapter("bitfit", tmp_path, "BertForSequenceClassification", modules_to_save=["classifier"])
    text = adapter_text(adapter_report(tmp_path), 80)
    assert "full copies    classifier" in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("adapter")), text


@pytest.mark.parametrize("method", ["lora", "ssb", "bitfit", "prompt", "prefix", "houlsby"])
def test_the_picture_is_drawn_only_where_it_was_asked_for(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_adapter(method, tmp_path / "adapter")
    before = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    inspected(capsys, str(tmp_path / "adapter"))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == before == [CONFIG, WEIGHTS, OWN_CONFIG]
    out = inspected(capsys, str(tmp_path / "adapter"), "--picture", str(tmp_path / "moved.png"))
    assert f"picture: {tmp_path / 'moved.png'}" in out
    pixels = imread(tmp_path / "moved.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 700 and pixels[..., :3].std() > 0.05
    inspected(capsys, str(tmp_path / "adapter"), "--picture", str(tmp_path))
    assert (tmp_path / "adapter.png").exists() and not list(tmp_path.glob(".*"))


def test_a_picture_in_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_adapter("lora", tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter"), "--picture", str(tmp_path / "no" / "x.png")]) == 2
    assert "x.png', whose folder is not there; accepted: a PNG's path, or a folder" in capsys.readouterr().err


def test_a_run_and_its_checkpoints_can_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint's frozen factors lie beside it, once for the run."""
    make_model(tmp_path / "model")
    make_records(tmp_path / "train.jsonl", 12)
    run = tmp_path / "run"
    status = train(
        {
            "model": {"path": str(tmp_path / "model"), "storage": "fp32"},
            "subspace": {"method": "pissa", "rank": 2},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32, "packing": False},
            "training": {"max_steps": 2, "global_batch_size": 2, "learning_rate": 0.01},
            "deepspeed": {"preset": "zero0"},
            "checkpoint": {"save_steps": 1},
            "run": {"output_dir": str(run), "report_to": "none"},
        }
    )
    assert status == 0
    capsys.readouterr()
    final = json.loads(inspected(capsys, str(run), "--json"))
    checkpoint = next(run.glob("checkpoint-*"))
    of_checkpoint = json.loads(inspected(capsys, str(checkpoint), "--json"))
    assert final["method"] == of_checkpoint["method"] == "pissa" and final["layers"] > 0
    assert [row["layer"] for row in of_checkpoint["by_layer"]] == [row["layer"] for row in final["by_layer"]]
    assert of_checkpoint["by_layer"][0]["norm"] > 0


def test_what_is_no_adapter_of_this_version_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_adapter("lora", tmp_path / "adapter")
    ours = json.loads((tmp_path / "adapter" / OWN_CONFIG).read_text())
    for method, sentence in (("lorax", "'lorax', which this version does not know"), ("dora", "its file lacks")):
        folder = tmp_path / method
        shutil.copytree(tmp_path / "adapter", folder)
        (folder / OWN_CONFIG).write_text(json.dumps(ours | {"method": method, "options": {}}))
        assert main(["inspect", str(folder)]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "lorax" / OWN_CONFIG).write_text(json.dumps(ours | {"format": 99}))
    assert main(["inspect", str(tmp_path / "lorax")]) == 2
    assert "is of format 99; this version reads format 1" in capsys.readouterr().err
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"x")
    assert main(["inspect", str(tmp_path / "adapter")]) == 2
    assert "holds no whole adapter" in capsys.readouterr().err


def test_an_adapter_from_before_shapes_were_kept_still_shows_its_tensors(tmp_path: Path) -> None:
    saved_adapter("ssb", tmp_path)
    ours = json.loads((tmp_path / OWN_CONFIG).read_text())
    ours.pop("shapes")
    (tmp_path / OWN_CONFIG).write_text(json.dumps(ours))
    found = adapter_report(tmp_path)
    assert found["layers"] == 4 and len(found["norms"]) == 8
    assert torch.tensor(list(found["norms"].values())).isfinite().all()


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        (
            "lora",
            {"alpha": 7.0, "dropout": 0.25, "constraint": "mpc_n", "target_modules": ["c_fc"], "seed": 5},
            {"alpha": 7.0, "dropout": 0.25, "constraint": "mpc_n", "targets": ["c_fc"], "seed": 5, "mergeable": False},
        ),
        ("adalora", {}, {"constraint": "mpc_o", "mergeable": True}),
        ("ssl", {}, {"constraint": None, "targets": "the method's own: key, value, FFN-up", "mergeable": True}),
        ("lora", {"new_tokens": [96, 97, 98]}, {"new_tokens": 3, "seed": 0, "modules_to_save": []}),
        ("lora", {"rank_pattern": {"c_fc": 2}}, {"rank_pattern": {"c_fc": 2}, "rank": 4}),
    ],
)
def test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own(
    method: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    saved_adapter(method, tmp_path, **given)
    found = adapter_report(tmp_path)
    assert {key: found[key] for key in expected} == expected
    lines = adapter_text(found, 200).splitlines()
    if "mergeable" in expected:
        assert f"merges         {'yes' if expected['mergeable'] else 'no'}" in lines
    assert ("new tokens     3" in lines) == ("new_tokens" in given)


def test_norms_are_of_the_trained_tensors_and_of_each_virtual_token(tmp_path: Path) -> None:
    model = saved_adapter("pissa", tmp_path / "pissa")
    expected = {
        f"{name}.{suffix}": float(p.detach().norm())
        for name, part in model.named_modules()
        for suffix, p in (part.trainables() if hasattr(part, "trainables") else {}).items()
    }
    found = adapter_report(tmp_path / "pissa")["norms"]
    assert sorted(found.values()) == pytest.approx(sorted(expected.values())), "frozen factors are none of them"
    saved_adapter("prompt", tmp_path / "prompt")
    tokens = load_file(tmp_path / "prompt" / WEIGHTS)["prompt_embeddings"]
    norms = [float(row.norm()) for row in tokens]
    assert len(norms) != tokens.shape[1] and adapter_report(tmp_path / "prompt")["by_token"] == pytest.approx(norms)


def test_of_many_layers_those_that_moved_most_and_least_are_listed(tmp_path: Path) -> None:
    saved_adapter("ssb", tmp_path)
    found = adapter_report(tmp_path)
    row = found["by_layer"][0]
    found["by_layer"] = [row | {"layer": f"layers.{n}.up", "norm": float(n)} for n in range(1, 31)]
    lines = adapter_text(found, 100).splitlines()
    most, least = (
        next(i for i, line in enumerate(lines) if line.startswith(f"moved {which}")) for which in ("most", "least")
    )
    assert [line.split()[0] for line in lines[most + 1 : least - 1]] == [f"layers.{n}.up" for n in range(30, 20, -1)]
    assert [line.split()[0] for line in lines[least + 1 :]] == [f"layers.{n}.up" for n in range(1, 6)]


def test_a_cell_of_the_picture_is_the_mean_of_its_layers_in_each_of_its_figures(tmp_path: Path) -> None:
    """Three experts of one block share a cell; the colour says a value's share of the largest."""
    saved_adapter("ssb", tmp_path / "adapter")
    found = adapter_report(tmp_path / "adapter")
    row = found["by_layer"][0] | {"module": "up", "rank": None, "effective_rank": None}
    cells = [(0, 0.4, 1.0), (0, 0.5, 1.0), (0, 0.6, 1.0), (1, 2.0, 1.25)]
    found["by_layer"] = [row | {"depth": depth, "norm": norm, "largest": most} for depth, norm, most in cells]
    adapter_picture(found, tmp_path / "x.png")
    pixels = (imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
    for share in (0.5 / 2.0, 1.0 / 1.25):
        colour = [round(255 * part) for part in colormaps["cividis"](share)[:3]]
        assert (abs(pixels - colour) <= 1).all(-1).sum() > 10_000, share
