"""What a trainer pushes while it saves, and at the end, is fetched back as the adapter; to a small hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import dist_subspace as dsub
from tests.hub_server import asked_from_here, hub_server
from tests.trainers import bench

FILES = {"adapter_config.json", "adapter_model.safetensors", "dist_subspace.json", "README.md", "tokenizer.json"}


def test_a_checkpoint_and_the_end_are_pushed_as_an_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with hub_server() as hub, asked_from_here(hub.address, tmp_path, "hf_mine"):
        pushing = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_strategy": "every_save"}
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        trainer = bench.made("SFTTrainer", base, tmp_path / "out", method="ssb", rank=None, **pushing, **saving)
        trainer.train()
        assert set(hub.repositories["me/mine"].files) >= FILES
        with torch.no_grad():
            for parameter in dsub.trainable_parameters(trainer.model):
                parameter.add_(0.1)
        trainer.push_to_hub(dataset="me/sentences", tags=["mine"])
        files = hub.repositories["me/mine"].files
        assert set(files) >= FILES and not any(name.startswith(("model", "pytorch_model")) for name in files)
        card = files["README.md"].decode()
        assert "library_name: dist-subspace" in card and "- me/sentences" in card and "- sft" in card
        again = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), "me/mine")
    expected, found = bench.values(trainer.model), bench.values(again)
    assert all(torch.allclose(value, found[name], atol=1e-6) for name, value in expected.items())
