"""Prompt-tuning: initial values, placement, PEFT's own logits from our file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import processors

from dist_subspace import SubspaceConfig, attach, load_adapter, save_adapter, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import read_description
from dist_subspace.subspace.reconstruction.prompt import Prompt
from tests.subspace.virtual_tokens.given import COUNT, config, ids, model_with
from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from tests.tiny_run import make_tokenizer


def rows_of(model: Any) -> torch.Tensor:
    return model.prompt_tokens.prompt_embeddings.detach()


def test_the_count_is_one_embedding_a_token() -> None:
    model = attach(tiny_model(), config("prompt"))
    assert [tuple(p.shape) for p in trainable_parameters(model)] == [(COUNT, 32)]


def test_it_begins_with_rows_of_the_vocabulary_drawn_by_the_seed() -> None:
    model = attach(tiny_model(), config("prompt"))
    table = model.get_input_embeddings().weight
    found = torch.cdist(rows_of(model), table).argmin(1)
    assert torch.equal(rows_of(model), table[found]) and len(set(found.tolist())) > 1
    again = attach(tiny_model(), config("prompt"))
    other = attach(tiny_model(), SubspaceConfig(method="prompt", options={"num_virtual_tokens": COUNT}, seed=1))
    assert torch.equal(rows_of(again), rows_of(model)) and not torch.equal(rows_of(other), rows_of(model))


def test_rows_are_drawn_from_the_whole_vocabulary() -> None:
    model = attach(tiny_model(), config("prompt", num_virtual_tokens=50))
    found = torch.cdist(rows_of(model), model.get_input_embeddings().weight).argmin(1)
    assert torch.histc(found.float(), 4, 0, VOCABULARY).min() >= 5, "of each quarter about a dozen"


def test_it_begins_with_a_texts_embeddings_repeated_or_cut() -> None:
    table = tiny_model().get_input_embeddings().weight
    for given, used in (([5, 6, 7], [5, 6, 7, 5]), ([9, 8, 7, 6, 5, 4], [9, 8, 7, 6])):
        model = attach(tiny_model(), config("prompt", init="text", init_ids=given))
        assert torch.equal(rows_of(model), table[used])


def test_an_embedding_that_scales_its_rows_is_asked_for_them() -> None:
    model = tiny_model()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 3)
    attach(model, config("prompt", init="text", init_ids=[5, 6, 7, 8]))
    assert torch.equal(rows_of(model), 3 * model.get_input_embeddings().weight[[5, 6, 7, 8]])


def test_normal_values_have_the_usual_spread() -> None:
    model = attach(tiny_model(), config("prompt", init="normal", num_virtual_tokens=50))
    assert 0.018 < float(rows_of(model).std()) < 0.022


def test_a_runs_tokenizer_reads_the_text() -> None:
    tokenizer = make_tokenizer()
    given = config("prompt", init="text", init_text="ab")
    found = Prompt.read_text(given, tokenizer).options["init_ids"]
    assert found == tokenizer.convert_tokens_to_ids(["a", "b"])
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    assert tokenizer("ab")["input_ids"] == [0, *found, 1]
    assert Prompt.read_text(given, tokenizer).options["init_ids"] == found, (
        "a text's own tokens, and no marks around it"
    )
    assert Prompt.read_text(config("prompt"), tokenizer) == config("prompt")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init": "text"}, "without one; accepted: with init_text, or init_ids"),
        ({"init": "text", "init_text": "ab"}, "needs a tokenizer, which attach has not; accepted: init_ids"),
        ({"init": "text", "init_ids": [VOCABULARY]}, f"init_ids has {VOCABULARY}; accepted: ids below {VOCABULARY}"),
        ({"init": "words"}, "accepted: vocab, normal, text"),
        ({"placement": "back"}, "accepted: front, after-first or null"),
        ({"num_virtual_tokens": 0}, "a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        attach(tiny_model(), config("prompt", **options))


def test_the_tokens_stand_after_the_first_where_an_encoders_head_reads_that() -> None:
    placements = {
        "BertForSequenceClassification": "after-first",
        "RobertaForSequenceClassification": "after-first",
        "BertForMaskedLM": "front",
        "LlamaForCausalLM": "front",
        "T5ForConditionalGeneration": "front",
    }
    for family, placement in placements.items():
        assert attach(tiny_model(family), config("prompt")).prompt_tokens.placement == placement


def test_the_pooled_token_is_the_inputs_own_and_stays_at_position_zero() -> None:
    """After the first token, BERT's head reads [CLS] in its own place; in front, it would read a virtual token."""
    model = model_with("prompt", "BertForSequenceClassification", placement="after-first")
    seen: list[torch.Tensor] = []
    model.bert.embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        model(**inputs)
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][:, 1] = 7
        model(**changed)
    alone = tiny_model("BertForSequenceClassification").bert.embeddings(inputs["input_ids"])
    assert seen[0].shape[1] == 7 + COUNT
    torch.testing.assert_close(seen[0][:, 0], alone[:, 0])
    assert torch.equal(seen[0][:, 1 : COUNT + 1], seen[1][:, 1 : COUNT + 1])
    assert not torch.equal(seen[0][:, COUNT + 1], seen[1][:, COUNT + 1])


def test_the_other_placement_is_another_function_with_the_same_promises() -> None:
    rows = ids(2, 7)
    with torch.no_grad():
        front, after = (model_with("prompt", placement=p)(input_ids=rows).logits for p in ("front", "after-first"))
        model = model_with("prompt", placement="after-first")
        prompt = model.generate(rows, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(input_ids=prompt[:, :-1], use_cache=False).logits
    assert front.shape == after.shape and not torch.allclose(front, after, atol=1e-3)
    assert torch.equal(logits[:, -3:].argmax(-1), prompt[:, -3:])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_peft_computes_the_same_from_our_file(method: str, name: str, tmp_path: Path) -> None:
    model = model_with(method, name)
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, 5:] = 0
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    with torch.no_grad():
        found, expected = theirs(**inputs).logits, model(**inputs).logits
    if found.shape[1] > expected.shape[1]:
        found = found[:, COUNT:]
    keep = torch.ones(expected.shape[:2], dtype=torch.bool)
    if name != "T5ForConditionalGeneration":
        keep = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-4)


def test_peft_is_not_promised_what_it_does_otherwise(tmp_path: Path) -> None:
    for family, options in (("LlamaForCausalLM", {"placement": "after-first"}), ("BertForMaskedLM", {})):
        save_adapter(model_with("prompt", family, **options), tmp_path)
        assert read_description(tmp_path)["peft_type"] is None


def test_a_text_is_not_read_again_when_its_adapter_is_loaded(tmp_path: Path) -> None:
    model = attach(tiny_model(), config("prompt", init="text", init_text="ab", init_ids=[5, 6]))
    save_adapter(model, tmp_path)
    assert torch.equal(rows_of(load_adapter(tiny_model(), tmp_path)), rows_of(model))
