"""Tokenizers that are larger than the model: what counts is which ids the data uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_subspace.errors import UsageError
from dist_subspace.loading.tokenizer import extend_tokenizer, load_tokenizer
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.data import DataSettings, prepare
from dist_subspace.training.run import train
from dist_subspace.training.vocabulary import check_ids_used, usable_pad_id, without_gap
from tests.tiny_run import make_model, make_tokenizer

ROWS = 258  # of the model: two marks and 256 bytes


def one_more() -> Any:
    """A token for images beside a text model, as in Gemma 3's smallest."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    return tokenizer


def marks_of_infilling() -> Any:
    """Sixteen more, as in CodeLlama's largest."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<FIM_{n}>" for n in range(16)], special_tokens=True)
    return tokenizer


def padding_without_a_row() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def fewer_tokens_than_ids() -> Any:
    """258 tokens, as many as the model has rows, but the last one has id 300."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    vocabulary["z"] = 300
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


LARGER: dict[str, tuple[Callable[[], Any], str, str]] = {
    "one more": (one_more, "<image_soft_token>", "'<image_soft_token>' (id 258)"),
    "sixteen more": (marks_of_infilling, "<FIM_9>", "'<FIM_9>' (id 267)"),
    "padding without a row": (padding_without_a_row, "<pad>", "'<pad>' (id 258)"),
    "fewer tokens than ids": (fewer_tokens_than_ids, "z", "'z' (id 300)"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    make_model(path / "model")
    for name, (make, _, _) in LARGER.items():
        make().save_pretrained(path / name)
    return path


def configuration(folder: Path, run: Path, tokenizer: str | None, texts: list[str], **model: Any) -> dict[str, Any]:
    run.mkdir(exist_ok=True)
    (run / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "model": {
            "path": str(folder / "model"),
            "storage": "fp32",
            "tokenizer": None if tokenizer is None else str(folder / tokenizer),
        }
        | model,
        "subspace": {"method": "lora", "rank": 2},
        "data": {"train": str(run / "train.jsonl"), "format": "text", "max_length": 48, "packing": False},
        "training": {"max_steps": 2, "global_batch_size": 2, "per_device_train_batch_size": 2},
        "deepspeed": {"preset": "zero0"},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


PLAIN = ["a text", "another one that is longer", "the third", "4"]


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the model's own tokenizer gives."""
    run = tmp_path_factory.mktemp("own")
    assert train(configuration(folder, run, None, PLAIN)) == EXIT_OK
    return losses(run)


@pytest.mark.parametrize("name", LARGER)
def test_a_larger_tokenizer_trains_text_that_needs_none_of_its_further_tokens(
    name: str, folder: Path, expected: list[float], tmp_path: Path
) -> None:
    assert train(configuration(folder, tmp_path, name, PLAIN)) == EXIT_OK
    assert losses(tmp_path) == expected


@pytest.mark.parametrize("name", LARGER)
def test_a_token_without_a_row_is_refused_with_its_id_its_record_and_what_to_do(
    name: str, folder: Path, tmp_path: Path
) -> None:
    _, text, token = LARGER[name]
    config = configuration(folder, tmp_path, name, [*PLAIN, f"here {text} is one"])
    assert train(config) == EXIT_USAGE
    said = read_status(tmp_path)["message"]  # type: ignore[index]
    assert f"train.jsonl: record 5 has the token {token}" in said
    assert "the model has 258 rows" in said and "model.new_tokens: [" in said and "\n" not in said


def test_new_tokens_of_a_larger_tokenizer_get_rows_and_so_does_what_lies_between(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, "one more", [*PLAIN, "<|im_end|> it is"], new_tokens=["<|im_end|>"])
    assert train(config) == EXIT_OK
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.new_tokens.embedding"]
    tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    assert rows.shape == (2, 32) and tokenizer.convert_tokens_to_ids("<|im_end|>") == ROWS + 1
    known = configuration(folder, tmp_path / "known", "sixteen more", ["a <FIM_2> b", "c"], new_tokens=["<FIM_2>"])
    assert train(known) == EXIT_OK


def test_the_end_of_sequence_without_a_row_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert train(configuration(folder, tmp_path / "run", str(tmp_path / "tokenizer"), PLAIN)) == EXIT_USAGE
    assert "record 1 has the token '<|im_end|>' (id 258)" in read_status(tmp_path / "run")["message"]  # type: ignore[index]


def test_a_gap_is_filled_and_said_unless_the_tokenizer_is_another_models() -> None:
    tokenizer, said = marks_of_infilling(), []
    assert without_gap([260], ROWS, tokenizer, said.append) == (260, 258, 259)
    assert said == [
        "the tokenizer has '<FIM_0>', '<FIM_1>' between the model's 258 rows and model.new_tokens: new rows too"
    ]
    assert without_gap([3, ROWS], ROWS, tokenizer, said.append) == (3, ROWS) and len(said) == 1
    with pytest.raises(UsageError, match="accepted: new tokens with the model's own tokenizer"):
        without_gap([5000], ROWS, tokenizer, said.append)


def test_padding_is_the_tokenizers_where_it_has_a_row() -> None:
    said: list[str] = []
    tokenizer = padding_without_a_row()
    assert (
        usable_pad_id(tokenizer, None, (), said.append) == usable_pad_id(tokenizer, ROWS + 1, (), said.append) == ROWS
    )
    assert usable_pad_id(tokenizer, ROWS, (ROWS,), said.append) == ROWS and not said
    assert (
        usable_pad_id(tokenizer, ROWS, (), said.append) == 1
        and "none for the padding token '<pad>' (id 258)" in said[0]
    )


def letters() -> Any:
    """One token a letter and no marks: a sample begins with its first letter's id. "h", the last, has no row below."""
    inner = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh")}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a")


@pytest.mark.parametrize(
    ("train", "held_out", "named"),
    [
        ([["abc", "hab", "ab"]], None, "first: record 2 "),
        ([["abc", "ab", "abh"]], None, "first: record 3 "),
        ([["abc"], ["ab", "ah"]], None, "second: record 2 "),
        ([["abc"]], ["ab", "ab", "ha"], "data.eval: record 3 "),
    ],
)
def test_the_record_is_named_wherever_the_token_stands(
    train: list[list[str]], held_out: list[str] | None, named: str, tmp_path: Path
) -> None:
    def written(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(tmp_path / name)

    tokenizer, files = letters(), [(written(f"{n}.jsonl", texts), 1.0) for n, texts in enumerate(train)]
    settings = DataSettings(
        train=files, eval=None if held_out is None else written("eval.jsonl", held_out), format="text"
    )
    data, names = prepare(settings, tokenizer, tmp_path / "cache", 0, False, "causal-lm"), ["first", "second"]
    with pytest.raises(UsageError, match=f"^{named}has the token 'h' \\(id 7\\), and the model has 7 rows"):
        check_ids_used(data, tokenizer, 7, (), names[: len(train)])
    check_ids_used(data, tokenizer, 7, (7,), names[: len(train)])
    check_ids_used(data, tokenizer, 8, (), names[: len(train)])


def test_a_new_token_never_gets_the_id_of_another() -> None:
    """The tokenizers library numbers a new token by how many there are."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "c": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(
        UsageError, match="has 'X', to which the tokenizer, whose ids have gaps, would give the id 4 of 'c'"
    ):
        extend_tokenizer(tokenizer, ["X"])
