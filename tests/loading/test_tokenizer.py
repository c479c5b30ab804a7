"""Real tokenizers: the ids and texts are sentencepiece's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dist_subspace.errors import UsageError
from dist_subspace.loading.tokenizer import extend_tokenizer, load_tokenizer
from dist_subspace.training.data.tokens import tokenizer_digest
from tests.tiny_run import make_tokenizer

DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "tokenizers").is_dir(), reason="DIST_SUBSPACE_DATA holds no tokenizers")
MODELS = ["mistral-v1-32000", "mistral-v3-32768", "spm-test-unigram-1000"]
TEXTS = [
    "Once upon a time",
    " leading space",
    "   three leading",
    "two  blanks  inside",
    "line\nbreak\n\n\nmore\r\nand\ttab",
    "\nstarts with a break",
    "emoji 🙂 and 家族 👨‍👩‍👧",
    "snow ☃, naïve, ﬁ, ①",
    "ends with blank ",
    "",
    " ",
    "▁underline [INST] <unk>",
]


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_a_bare_sentencepiece_model_gives_the_ids_of_sentencepiece(name: str, tmp_path: Path) -> None:
    source = DATA / "tokenizers" / f"{name}.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    shutil.copy(source, tmp_path / "tokenizer.model")
    for tokenizer in (load_tokenizer(str(tmp_path)), load_tokenizer("nowhere", tokenizer=str(source))):
        assert len(tokenizer) == reference.get_piece_size()
        for text in TEXTS:
            if "<unk>" in text:  # special tokens are recognised in text here, for chat templates
                continue
            ids = reference.encode(text)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
            assert tokenizer(text)["input_ids"] == [1, *ids], text
            assert tokenizer.decode(ids) == reference.decode(ids), text
            assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == reference.decode(ids), text


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_no_pad_token_means_the_end_of_sequence_pads_and_the_vocabulary_stays(name: str) -> None:
    tokenizer = load_tokenizer("nowhere", tokenizer=str(DATA / "tokenizers" / f"{name}.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode([1, 2]) == "<s></s>"


@needs_data
def test_byte_fallback_comes_back_as_text_and_a_missing_character_as_unknown() -> None:
    folder = DATA / "tokenizers"
    bytes_ = load_tokenizer("nowhere", tokenizer=str(folder / "mistral-v1-32000.model"))
    assert bytes_.decode(bytes_("𝕏 ☃ 🙂", add_special_tokens=False)["input_ids"]) == "𝕏 ☃ 🙂"
    none = load_tokenizer("nowhere", tokenizer=str(folder / "spm-test-unigram-1000.model"))
    ids = none("a ☃ b", add_special_tokens=False)["input_ids"]
    assert 0 in ids and "⁇" in none.decode(ids)


@needs_data
def test_a_saved_sentencepiece_tokenizer_is_the_same_when_loaded_again(tmp_path: Path) -> None:
    first = load_tokenizer("nowhere", tokenizer=str(DATA / "tokenizers" / "mistral-v1-32000.model"))
    first.chat_template = "{{ messages }}"
    first.save_pretrained(tmp_path)
    second = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert first(text)["input_ids"] == second(text)["input_ids"]
    assert second.chat_template == first.chat_template


@needs_data
def test_flags_of_the_tokenizer_config_decide_on_begin_and_end(tmp_path: Path) -> None:
    shutil.copy(DATA / "tokenizers" / "mistral-v1-32000.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false, "add_eos_token": true, "unk_token": "<unk>"}'
    )
    ids = load_tokenizer(str(tmp_path))("hello")["input_ids"]
    assert ids[0] != 1 and ids[-1] == 2


@needs_data
def test_a_model_folder_with_its_own_tokenizer_agrees_with_its_sentencepiece_file() -> None:
    folder = DATA / "models" / "stories260K" / "hf"
    tokenizer = load_tokenizer(str(folder))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(tokenizer) == 512 and tokenizer.pad_token_id == 2
    for text in ["Once upon a time", "a ☃ and 🙂", "two  blanks\nline"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_folder_without_a_tokenizer_is_refused_with_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer in .*tokenizer\.model"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="no folder or file"):
        load_tokenizer(str(tmp_path / "missing"))


def test_a_file_that_is_no_sentencepiece_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UsageError, match="no sentencepiece model") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@needs_data
def test_settings_that_are_no_object_are_refused_in_one_sentence(tmp_path: Path) -> None:
    shutil.copy(DATA / "tokenizers" / f"{MODELS[0]}.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"tokenizer_config.json' holds list; accepted: an object"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_new_tokens_follow_the_pieces_and_come_back_from_a_saved_tokenizer(name: str, tmp_path: Path) -> None:
    source = str(DATA / "tokenizers" / f"{name}.model")
    tokenizer, text = load_tokenizer("nowhere", tokenizer=source), "say<|im_start|>hello<|im_end|>"
    pieces, before = len(tokenizer), tokenizer_digest(tokenizer)
    assert extend_tokenizer(tokenizer, ["<|im_end|>", "<|im_start|>"]) == [pieces, pieces + 1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(pieces) == ids.count(pieces + 1) == 1 and tokenizer_digest(tokenizer) != before
    assert "im_" not in tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert len(again) == pieces + 2 and again(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


@needs_data
def test_a_token_that_is_known_keeps_its_id() -> None:
    tokenizer = load_tokenizer("nowhere", tokenizer=str(DATA / "tokenizers" / "mistral-v3-32768.model"))
    known = tokenizer.convert_tokens_to_ids("[INST]")
    assert extend_tokenizer(tokenizer, ["[INST]", "<|new|>"]) == [known, len(tokenizer) - 1]


def test_no_new_tokens_leave_a_tokenizer_as_it_is() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_digest(tokenizer)
    assert extend_tokenizer(tokenizer, []) == [] and tokenizer_digest(tokenizer) == before


def test_a_new_token_never_takes_the_id_of_another() -> None:
    """A vocabulary with a gap is extended by its number of tokens, which may be an id that is taken."""
    core = Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    with pytest.raises(UsageError, match="would give the id 2 of 'b'; accepted: a tokenizer without gaps"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a"), ["<new>"])


def test_a_tokenizers_own_code_runs_only_where_that_is_said(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    code = "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (tmp_path / "tokenization_own.py").write_text(code)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(load_tokenizer(str(tmp_path), trust_remote_code=True)).__name__ == "Own"
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        trusted = place.is_file()  # a file is named for its vocabulary
        with pytest.raises(UsageError, match=r"accepted: model\.trust_remote_code true, with its folder named"):
            load_tokenizer(str(tmp_path), str(place), trust_remote_code=trusted)
