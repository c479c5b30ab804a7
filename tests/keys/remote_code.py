"""A model folder that brings its own code: a LLaMA whose logits are twice as large."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny_run import make_model

_CONFIGURATION = """
from transformers import LlamaConfig

class LouderConfig(LlamaConfig):
    model_type = "louder"
"""
_MODELING = """
from transformers import LlamaForCausalLM
from .configuration_louder import LouderConfig

class Louder(LlamaForCausalLM):
    config_class = LouderConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None, **kwargs):
        found = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **kwargs
        )
        found.logits = 2 * found.logits
        return found
"""


def folder_with_code(folder: Path) -> str:
    make_model(folder)
    (folder / "configuration_louder.py").write_text(_CONFIGURATION)
    (folder / "modeling_louder.py").write_text(_MODELING)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_louder.LouderConfig", "AutoModelForCausalLM": "modeling_louder.Louder"}
    config |= {"model_type": "louder", "architectures": ["Louder"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
