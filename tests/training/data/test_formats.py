"""What text each format trains on, and which of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.training.data import formats
from dist_subspace.training.data.encoding import Encoder
from tests.training.data.tokens_for_tests import char_tokenizer, prepared, texts


def write(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return str(path)


def test_alpaca_has_the_documented_text_and_no_input_block_where_the_input_is_empty(tmp_path: Path) -> None:
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Yo"}]
    rows += [{"instruction": "A", "output": "B"}, {"instruction": "A", "input": None, "output": "B"}]
    found = texts(prepared(tmp_path, train=write(tmp_path / "a.jsonl", rows)))
    assert found[0] == ("^### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3$", "3$")
    assert found[1] == ("^### Instruction:\nHi\n\n### Response:\nYo$", "Yo$")
    assert found[2] == found[3] == ("^### Instruction:\nA\n\n### Response:\nB$", "B$")


def test_a_template_replaces_the_alpaca_prompt_and_takes_plain_columns_only(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "Add", "input": "x", "output": "3", "n": 7}])
    found = texts(prepared(tmp_path, train=file, template="Q{{{n}}}: {instruction} {input}\nA:"))
    assert found == [("^Q{7}: Add x\nA:3$", "3$")]
    for template in ("{nothing}", "{instruction.__class__}", "{0}", "{instruction!r}", "{"):
        with pytest.raises(UsageError, match=r"data\.template"):
            prepared(tmp_path, train=file, template=template)


def test_fields_are_renamed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "1+1=", "answer": "2"}])
    found = texts(
        prepared(tmp_path, train=file, format="completion", prompt_field="question", completion_field="answer")
    )
    assert found == [("^1+1=2$", "2$")]


def test_a_long_sample_loses_its_prompt_from_the_left_and_never_its_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "abcdefgh", "completion": "xyz"}, {"prompt": "a", "completion": "0123456"}]
    rows += [{"prompt": "abc", "completion": "12345"}]
    data = prepared(tmp_path, train=write(tmp_path / "a.jsonl", rows), format="completion", max_length=6)
    # The mark stays; where the answer alone fills the room, there is none for it.
    assert texts(data) == [("^hxyz$", "xyz$"), ("12345$", "2345$")]
    assert data.left_out == 1


def test_no_sample_left_is_an_error_that_says_how_many_did_not_fit(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "0123456"}] * 3)
    with pytest.raises(UsageError, match=r"no sample is left with data\.max_length 4: 3 had"):
        prepared(tmp_path, train=file, format="completion", max_length=4)


def test_an_answer_that_is_empty_trains_the_end_of_sequence_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": ""}])
    data = prepared(tmp_path, train=file, format="completion")
    assert texts(data) == [("^ab$", "$")]
    assert data.train.target_counts.tolist() == [1]


def test_text_is_cut_into_pieces_and_every_token_but_a_first_is_a_target(tmp_path: Path) -> None:
    data = prepared(tmp_path, train=write(tmp_path / "a.jsonl", [{"text": "abcdefg"}]), format="text", max_length=4)
    assert texts(data) == [("^abc", "abc"), ("def", "ef"), ("g$", "$")]  # a last piece of one token would train nothing
    assert data.train.target_counts.tolist() == [3, 2, 1]
    assert data.left_out == 0


def test_a_long_document_is_tokenised_in_blocks_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks end at line ends; where a line is longer than a block, within it."""
    monkeypatch.setattr(formats, "BLOCK", 16)  # characters, where it is a million
    document = "line 1\nline 2\nline 3\n" + "0123456789" * 4 + "\nlast " + "abcdef" * 5 + "\n\nend"
    (tmp_path / "a.txt").write_text(document)
    data = prepared(tmp_path, train=str(tmp_path / "a.txt"), format="text", max_length=256)
    tokenizer = char_tokenizer()
    assert data.train.sample(0)[0].tolist() == [*tokenizer(document).input_ids, tokenizer.eos_token_id]


def test_classification_keeps_integers_and_sorts_names(tmp_path: Path) -> None:
    named = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    data = prepared(tmp_path, train=write(tmp_path / "a.jsonl", named), format="classification")
    assert data.labels == ["neg", "pos"]
    assert [data.train.sample(i)[1].tolist() for i in range(2)] == [[1], [0]]
    numbered = [{"text": "good", "label": 2}, {"text": "bad", "label": 0}]
    data = prepared(tmp_path, train=write(tmp_path / "b.jsonl", numbered), format="classification")
    assert data.labels == ["0", "1", "2"]
    assert [data.train.sample(i)[1].tolist() for i in range(2)] == [[2], [0]]
    assert data.train.target_counts.tolist() == [1, 1]


def test_classification_loses_text_from_the_left_and_keeps_the_mark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "abcdefgh", "label": 0}])
    data = prepared(tmp_path, train=file, format="classification", max_length=4)
    ids, _ = data.train.sample(0)
    assert char_tokenizer().convert_ids_to_tokens(ids.tolist()) == ["<s>", "f", "g", "h"]


def test_an_evaluation_label_that_training_lacks_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    other = write(tmp_path / "b.jsonl", [{"text": "x", "label": "zeta"}])
    with pytest.raises(UsageError, match="'zeta'"):
        prepared(tmp_path, train=train, eval=other, format="classification")


def test_a_record_without_the_column_names_the_columns_there_and_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y"}, {"instruction": "x", "answer": "y"}])
    with pytest.raises(UsageError, match=r"a\.jsonl: record 2 has no column 'output'.*instruction, answer"):
        prepared(tmp_path, train=file)


def test_the_border_of_prompt_and_answer_inside_a_token_leaves_the_prompt_as_generate_sees_it() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "c": 3, "<e>": 4}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), eos_token="<e>")
    encoder = Encoder(merging)
    assert encoder.pairs(["ca", "c"], ["bc", "ab"]) == [([3, 0], [1, 3, 4]), ([3], [2, 4])]
