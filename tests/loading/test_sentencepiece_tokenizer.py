"""Special tokens beside a bare sentencepiece file: ids, marks and blanks as `AutoTokenizer` of transformers has them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_subspace.errors import UsageError
from dist_subspace.loading.tokenizer import extend_tokenizer, load_tokenizer
from dist_subspace.training.data.tokens import tokenizer_digest

DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not (DATA / "tokenizers").is_dir(), reason="DIST_SUBSPACE_DATA holds no tokenizers")
BPE, CONTROLS, UNIGRAM = "mistral-v1-32000", "mistral-v3-32768", "spm-test-unigram-1000"
USER_DEFINED = set(range(751, 771))  # pieces of the model with controls that are text to sentencepiece, and so to us
CHAT = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nfine </s>and [INST] x<|im_end|>"


def token(text: str, **changes: Any) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": text, **plain, **changes}


IM = {"<|im_start|>": 32001, "<|im_end|>": 32000}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "added_tokens.json": (BPE, {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": IM}),
    "added_tokens_decoder": (
        BPE,
        {
            "tokenizer_config": {
                "eos_token": "<|im_end|>",
                "pad_token": token("<|im_end|>") | {"__type": "AddedToken"},
                "added_tokens_decoder": {str(number): token(text) for text, number in IM.items()},
            }
        },
    ),
    "an end of sequence without an id": (
        BPE,
        {"tokenizer_config": {"eos_token": token("<|im_end|>") | {"__type": "AddedToken"}}},
    ),
    "extra special tokens": (BPE, {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}),
    "special_tokens_map.json": (
        BPE,
        {
            "tokenizer_config": {},
            "special_tokens_map": {"eos_token": token("<|im_end|>"), "pad_token": "<pad>"},
            "added_tokens": {"<|im_start|>": 32000, "<|im_end|>": 32001, "<pad>": 32002},
        },
    ),
    "a begin that is no piece": (
        BPE,
        {"tokenizer_config": {"bos_token": "<|startoftext|>", "pad_token": "<pad>"}, "added_tokens": {"<pad>": 32000}},
    ),
    "blanks that go with the token": (
        BPE,
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "32000": token("<|im_end|>", lstrip=True, rstrip=True),
                    "32001": token("<|im_start|>", rstrip=True, special=False),
                }
            }
        },
    ),
    "no marks, older prefix": (
        BPE,
        {"tokenizer_config": {"legacy": True, "add_bos_token": False, "eos_token": "<|im_end|>"}, "added_tokens": IM},
    ),
    "control pieces": (CONTROLS, {"tokenizer_config": {}}),
    "control pieces and added ones": (
        CONTROLS,
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 32768}},
    ),
}


def folder(tmp_path: Path, model: str, files: dict[str, Any]) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    shutil.copy(DATA / "tokenizers" / f"{model}.model", place / "tokenizer.model")
    for name, content in files.items():
        if name == "tokenizer_config":
            content = {"tokenizer_class": "LlamaTokenizer"} | content
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


def facts(tokenizer: Any) -> dict[str, Any]:
    """Everything that must agree, a pad token that we give where there is none, and blanks of the decoded text, aside (with the
    older prefix transformers decodes one blank more than was there)."""
    ids = tokenizer(CHAT, add_special_tokens=False)["input_ids"]
    names = ("unk_token", "bos_token", "eos_token")
    return {name: (getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) for name in names} | {
        "size": len(tokenizer),
        "special": sorted(set(tokenizer.all_special_ids) - USER_DEFINED),
        "ids": ids,
        "text": "".join(tokenizer.decode(ids, skip_special_tokens=True).split()),
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_beside_a_model_file_are_those_of_auto_tokenizer(name: str, tmp_path: Path) -> None:
    place = folder(tmp_path, *FOLDERS[name])
    ours, theirs = load_tokenizer(str(place)), AutoTokenizer.from_pretrained(str(place))
    by_file = load_tokenizer("nowhere", tokenizer=str(place / "tokenizer.model"))
    assert facts(ours) == facts(theirs) == facts(by_file)
    if theirs.pad_token is not None:
        assert (ours.pad_token, ours.pad_token_id) == (theirs.pad_token, theirs.pad_token_id)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_tokenizer_says_the_same_to_us_and_to_auto_tokenizer(name: str, tmp_path: Path) -> None:
    first = load_tokenizer(str(folder(tmp_path, *FOLDERS[name])))
    first.chat_template = "{{ messages[0].content }}"
    extend_tokenizer(first, ["<|new|>"])
    first.save_pretrained(tmp_path / "saved")
    again, theirs = load_tokenizer(str(tmp_path / "saved")), AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert facts(again) == facts(first) == facts(theirs)
    assert first.pad_token_id == again.pad_token_id == theirs.pad_token_id
    assert (
        first("Hello<|new|>")["input_ids"] == again("Hello<|new|>")["input_ids"] == theirs("Hello<|new|>")["input_ids"]
    )
    assert first.chat_template == again.chat_template == theirs.chat_template
    assert tokenizer_digest(again) == tokenizer_digest(first)


def test_ids_that_skip_some_or_take_the_place_of_a_piece_are_the_files_and_stay_so(tmp_path: Path) -> None:
    """The definition: the model's rows are those that the file numbers (transformers 5.23 counts the tokens instead)."""
    decoder = {"32000": token("<|a|>"), "32005": token("<|b|>"), "7": token("<|c|>"), "1": token("<s>")}
    place = folder(tmp_path, BPE, {"tokenizer_config": {"eos_token": "<|c|>", "added_tokens_decoder": decoder}})
    first = load_tokenizer(str(place))
    first.save_pretrained(tmp_path / "saved")
    for tokenizer in (first, load_tokenizer(str(tmp_path / "saved"))):
        assert tokenizer("<|b|><|a|>x<|c|>", add_special_tokens=False)["input_ids"] == [32005, 32000, 28744, 7]
        assert tokenizer.eos_token_id == 7 and tokenizer.decode([32005, 7, 2]) == "<|b|><|c|></s>"
        assert tokenizer.decode([32005, 7, 2], skip_special_tokens=True) == ""
        assert len(tokenizer) == 32006 and extend_tokenizer(tokenizer, ["<|new|>"]) == [32006]
    gap = {"tokenizer_config": {"added_tokens_decoder": {"32003": token("<|b|>")}}}
    (tmp_path / "gap").mkdir()
    load_tokenizer(str(folder(tmp_path / "gap", BPE, gap))).save_pretrained(tmp_path / "gap" / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "gap" / "saved").convert_tokens_to_ids("<|b|>") == 32003


def test_a_unigram_model_keeps_its_own_ids_around_an_added_token(tmp_path: Path) -> None:
    files = {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 1000}}
    tokenizer = load_tokenizer(str(folder(tmp_path, UNIGRAM, files)))
    assert tokenizer.eos_token_id == 1000
    assert tokenizer("  two  blanks<|im_end|>", add_special_tokens=False)["input_ids"] == [
        *tokenizer.sp_model.encode("▁two blanks"),
        1000,
    ]


def test_a_special_token_written_as_a_plain_dictionary_is_read(tmp_path: Path) -> None:
    place = folder(tmp_path, BPE, {"tokenizer_config": {"eos_token": token("<|im_end|>"), "bos_token": token("</s>")}})
    tokenizer = load_tokenizer(str(place))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (32000, 2)


def test_ids_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"gives '<pad>' the id 900000000; accepted: ids that follow its 32,000 pieces"
    ):
        load_tokenizer(str(folder(tmp_path, BPE, {"added_tokens": {"<pad>": 900_000_000}})))


def test_a_model_without_added_tokens_keeps_the_fingerprint_of_its_ids() -> None:
    """A value from the first release: runs that were begun with it go on."""
    tokenizer = load_tokenizer("nowhere", tokenizer=str(DATA / "tokenizers" / f"{BPE}.model"))
    assert tokenizer_digest(tokenizer) == "905c37ac71cf97a1fba08ff0c92e7c6689f3981b779d7119334d186a3e8f7128"
