"""How wide the layers of a model are, family by family, beside what its configuration calls the width."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from dist_subspace.loading.load import model_widths
from dist_subspace.loading.widths import linear_inputs
from tests.tiny_models import FAMILIES, odd_model, tiny_config, tiny_model, vision_model


@pytest.mark.parametrize("family", FAMILIES)
def test_most_layers_of_the_blocks_have_the_width_of_the_stream_and_no_head_is_among_them(family: str) -> None:
    model = tiny_model(family)
    widths = linear_inputs(model)
    assert Counter(widths.values()).most_common(1)[0][0] == model.config.hidden_size
    assert not {"lm_head", "classifier", "score", "cls.predictions.decoder"} & widths.keys()


def test_a_conv1d_which_holds_its_inputs_first_says_the_same() -> None:
    widths = linear_inputs(odd_model("gpt2"))
    assert widths["transformer.h.0.mlp.c_fc"] == 45 and widths["transformer.h.0.mlp.c_proj"] == 35


def test_a_tower_that_text_never_reaches_does_not_count() -> None:
    model = vision_model("Qwen2VLForConditionalGeneration")
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    widths = linear_inputs(model)
    assert widths and any("visual" in name for name in every) and not any("visual" in name for name in widths)


def test_of_a_model_without_blocks_every_layer_counts_and_of_one_without_layers_its_embeddings() -> None:
    class Plain(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(5, 12), layer

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    assert linear_inputs(Plain(nn.Linear(7, 3))) == {"layer": 7}
    assert linear_inputs(Plain(nn.Identity())) == {"embeddings": 12}


def test_a_folder_is_asked_without_a_weight_and_by_one_block(tmp_path: Path) -> None:
    config = tiny_config("LlamaConfig", num_hidden_layers=3)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    widths = model_widths(tmp_path, "causal-lm")
    with torch.device("meta"):
        whole = transformers.LlamaForCausalLM(config)
    assert widths == {name: inputs for name, inputs in linear_inputs(whole).items() if ".layers.0." in name}
