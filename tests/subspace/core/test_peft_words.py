"""What PEFT says of the methods: its own configurations are the judge of the entries that are known."""

from __future__ import annotations

import ast
from typing import Any

import peft
import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.interchange.peft.importing import ENTRIES_OF_EVERY_KIND
from dist_subspace.subspace import SubspaceConfig, method_class, methods, resolve
from dist_subspace.subspace.core.peft_words import by_pattern
from dist_subspace.subspace.core.registry import file_spelling, peft_words, words_reading
from tests.ranks import ROOT

WORDS = {words.method: words for words in peft_words()}
TYPES = sorted({words.peft_type for words in peft_words()})
FORMS = {"LORA", "IA3", "lora", "lora_", "ia3_"}  # export writes any method as one of these two, where that is exact


def test_a_method_that_peft_reads_has_words_and_no_other_says_so() -> None:
    written = {name for name, words in WORDS.items() if words.writes}
    assert {name for name, info in methods().items() if info.peft_type} == written
    assert WORDS.keys() - written == {"pissa", "olora"}
    assert all(method_class(name).peft is words for name, words in WORDS.items())
    assert all(method_class(name).peft is None for name in methods().keys() - WORDS.keys())


@pytest.mark.parametrize("kind", TYPES)
def test_every_entry_that_peft_writes_unasked_is_known(kind: str) -> None:
    needed: dict[str, Any] = {"ADALORA": {"total_step": 1}, "OFT": {"oft_block_size": 32, "r": 0}}.get(kind, {})
    entries = peft.get_peft_config({"peft_type": kind, **needed}).to_dict()
    known = ENTRIES_OF_EVERY_KIND | words_reading({"peft_type": kind}).known_entries
    assert {name for name, value in entries.items() if value and name not in known} == set()


@pytest.mark.parametrize("method", [name for name, words in WORDS.items() if words.writes])
def test_the_entries_that_a_method_writes_are_read_as_that_method(method: str) -> None:
    words, settings = WORDS[method], resolve(SubspaceConfig(method)).settings
    entries = {"peft_type": words.peft_type, **words.entries(settings)}
    reader = words_reading(entries)
    assert reader.method == ("lora" if method == "lora-fa" else method)
    assert {name for name in entries if entries[name]} <= ENTRIES_OF_EVERY_KIND | reader.known_entries


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, "lora"),
        ({"use_rslora": True}, "rslora"),
        ({"use_dora": True}, "dora"),
        ({"use_dora": True, "use_rslora": True}, "dora"),
        ({"init_lora_weights": "gaussian", "use_rslora": True}, "rslora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora", "use_rslora": True}, "olora"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "dora"),  # which refuses it
        ({"init_lora_weights": "corda"}, "lora"),  # which refuses it
    ],
)
def test_single_fields_of_a_lora_make_another_method(fields: dict[str, Any], method: str) -> None:
    assert words_reading({"peft_type": "LORA", **fields}).method == method


def test_a_start_whose_base_is_another_is_refused_with_those_that_are_known() -> None:
    tensors = {f"base_model.model.q.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    for fields in ({"init_lora_weights": "corda"}, {"init_lora_weights": "corda", "use_rslora": True}):
        described = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
        with pytest.raises(UsageError, match=r"'corda', whose base .* accepted: True, False, .*, mica, olora, pissa"):
            words_reading(described).read(described, dict(tensors))


def test_a_pattern_means_a_whole_name_or_its_end_and_the_first_key_counts() -> None:
    pattern = {"q": 1, r"layers\.1\.k": 2, "k": 3, "nothing": 4}
    layers = ["q", "layers.0.q", "layers.0.xq", "layers.1.k", "layers.0.k"]
    assert list(by_pattern(pattern, 9, layers).values()) == [1, 1, 9, 2, 3]
    assert by_pattern(None, 9, layers) == dict.fromkeys(layers, 9)


def test_a_file_spells_doras_magnitudes_as_transformers_reads_them() -> None:
    assert file_spelling() == {"lora_magnitude_vector": "lora_magnitude_vector.weight"}


def test_interchange_names_no_method_of_peft() -> None:
    """A new one is told by its own file alone."""
    names = {*TYPES, *WORDS} - FORMS
    prefixes = tuple({words.tensor_prefix for words in peft_words()} - FORMS)
    for file in (ROOT / "dist_subspace" / "interchange").rglob("*.py"):
        constants = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        strings = [value for value in constants if isinstance(value, str)]
        assert not [text for text in strings if text in names or text.startswith(prefixes)], file
