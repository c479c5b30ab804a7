"""The longest row of a family and its first position: what transformers' own model takes, and does, when it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from dist_subspace.loading.positions import Positions, count_from, positions_of
from dist_subspace.loading.transformers_internals import build_skeleton

STATED = 20  # max_position_embeddings of every configuration here
SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_inner": 40,
    "emb_dim": 32,
    "dim": 32,
    "hidden_dim": 40,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": 99,
    "max_position_embeddings": STATED,
    "n_positions": STATED,
    "rotary_dim": 8,
    "attention_window": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BEGIN_LATER = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl")
CAUSAL = (
    *BEGIN_LATER,
    "opt",
    "gpt2",
    "bart",
    "mbart",
    "biogpt",
    "xglm",
    "bloom",
    "gptj",
    "codegen",
    "ctrl",
    "bert",
    "mvp",
)
CLASSIFY = (
    *BEGIN_LATER,
    "mpnet",
    "longformer",
    "ibert",
    "esm",
    "markuplm",
    "bert",
    "albert",
    "electra",
    "distilbert",
    "bart",
)
CLASSIFY = (*CLASSIFY, "nystromformer", "yoso", "deberta", "deberta-v2", "mt5", "opt", "xlm", "canine", "fnet")


def configuration(family: str, **changes: Any) -> Any:
    known = CONFIG_MAPPING[family]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    return CONFIG_MAPPING[family](**sizes | changes)


def found(auto: Any, config: Any, wanted: int = 2 * STATED) -> Positions:
    return positions_of(lambda changed: build_skeleton(auto, changed, torch.float32), config, wanted)


def takes(model: Any, length: int) -> bool:
    ids = torch.full((1, length), 7)
    ids[:, -1] = 2  # an end, without which an encoder-decoder does not classify
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def check_longest(auto: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model, longest = auto.from_config(config).eval(), found(auto, config).longest
    if longest is None:
        assert takes(model, 2 * STATED)
    else:
        assert takes(model, longest) and not takes(model, longest + 1)
    assert (
        found(auto, config, SHORT_ENOUGH).longest is None or found(auto, config, SHORT_ENOUGH).longest >= SHORT_ENOUGH
    )  # type: ignore[operator]
    return model


SHORT_ENOUGH = STATED - 2


@pytest.mark.parametrize("family", CLASSIFY)
def test_the_longest_row_of_a_classifier_is_the_longest_that_it_takes(family: str) -> None:
    check_longest(transformers.AutoModelForSequenceClassification, configuration(family))


@pytest.mark.parametrize("family", CAUSAL)
def test_the_longest_row_and_the_first_position_of_a_causal_model_are_its_own(family: str) -> None:
    auto, config = transformers.AutoModelForCausalLM, configuration(family, is_decoder=True)
    model = check_longest(auto, config)
    first = found(auto, config).first
    assert first == (2 if family in BEGIN_LATER else 0)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    counted = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12)}
    with torch.no_grad():
        own = model(input_ids=ids).logits
        count_from(model, first)
        assert torch.equal(model(**counted).logits, own)


def test_a_table_with_another_padding_begins_elsewhere() -> None:
    config = configuration("roberta", pad_token_id=4, is_decoder=True)
    assert found(transformers.AutoModelForCausalLM, config) == Positions(STATED - 5, 5)


def test_relative_positions_have_no_limit_and_rotary_ones_the_stated() -> None:
    auto = transformers.AutoModelForSequenceClassification
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1}
    deberta = configuration("deberta-v2", position_biased_input=False, position_buckets=8, **relative)
    assert check_longest(auto, deberta) and found(auto, deberta).longest is None
    auto = transformers.AutoModelForCausalLM
    alibi = CONFIG_MAPPING["falcon"](
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, alibi=True
    )
    alibi.max_position_embeddings = STATED
    assert found(auto, alibi).longest is None
    assert found(auto, configuration("llama")).longest == STATED
    for rope, longest in (
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}, 80),
        ({"rope_type": "linear", "factor": 3.0}, 60),
        ({"rope_type": "dynamic", "factor": 2.0}, 40),
    ):
        config = configuration("llama", rope_parameters={"rope_theta": 10000.0, **rope})
        assert found(auto, config, 1000).longest == longest


def test_the_probe_needs_no_memory_for_weights() -> None:
    config = CONFIG_MAPPING["opt"](hidden_size=9216, ffn_dim=36864, num_hidden_layers=64, num_attention_heads=72)
    assert found(transformers.AutoModelForCausalLM, config, 4000) == Positions(2048, 0)


def test_a_family_that_cannot_be_probed_has_what_its_configuration_states() -> None:
    def broken(config: Any) -> Any:
        raise ValueError("no such model")

    assert positions_of(broken, configuration("bert"), 100) == Positions(STATED, 0)
