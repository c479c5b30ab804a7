"""Every file that transformers reads of a tokenizer goes with an adapter, and of several tokenizers the right one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from transformers import AutoTokenizer, tokenization_utils_base, utils

from dist_subspace.interchange.tokenizer_files import copy_tokenizer, has_tokenizer, tokenizer_of
from tests.tiny_run import make_tokenizer


def files_that_transformers_reads() -> set[str]:
    """Those of every tokenizer, and those in the tables of single families."""
    base = tokenization_utils_base
    names = {base.SPECIAL_TOKENS_MAP_FILE, base.ADDED_TOKENS_FILE, base.TOKENIZER_CONFIG_FILE, base.FULL_TOKENIZER_FILE}
    names |= {utils.CHAT_TEMPLATE_FILE, utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE}
    for source in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                names |= set(ast.literal_eval(node.value).values())
    return names


def test_every_file_of_a_tokenizer_goes_along(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    (base / utils.CHAT_TEMPLATE_DIR).mkdir(parents=True)
    out.mkdir()
    names = files_that_transformers_reads()
    assert {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "source.spm"} <= names
    for name in (*names, f"{utils.CHAT_TEMPLATE_DIR}/tools.jinja", "model.safetensors", "config.json"):
        (base / name).write_text(name)
    copy_tokenizer(base, out)
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert found == {name: name for name in (*names, f"{utils.CHAT_TEMPLATE_DIR}/tools.jinja")}
    assert has_tokenizer(out) and not has_tokenizer(tmp_path) and not has_tokenizer(None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run's, beside the run's configuration; the base's tokenizer is the bytes'."""
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    configured(tmp_path / "run" / "checkpoint-2")
    return tmp_path / "run" / "checkpoint-2"


def configured(checkpoint: Path, **more: Any) -> None:
    run = checkpoint.parent
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(run.parent / "base"), **more}}))


def larger(folder: Path, *tokens: str) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_has_the_tokenizer_that_its_run_was_trained_with(checkpoint: Path) -> None:
    """The base's; the base's with the run's new tokens; or another that the run names: as transformers reads them."""
    base = checkpoint.parents[1] / "base"
    plain = AutoTokenizer.from_pretrained(base)
    assert tokenizer_of(checkpoint) == base
    configured(checkpoint, new_tokens=["<x>", "<y>"])
    plain.add_tokens(["<x>", "<y>"])
    assert tokenizer_of(checkpoint).get_vocab() == plain.get_vocab() and "<y>" in plain.get_vocab()
    other = larger(base.parent / "other", "<z>")
    configured(checkpoint, tokenizer=str(other))
    assert tokenizer_of(checkpoint).get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
    configured(checkpoint, tokenizer=str(base.parent / "none"))
    assert tokenizer_of(checkpoint) is None


def test_a_tokenizer_in_the_folder_comes_before_the_run_s_final_adapter_s_and_that_before_the_base_s(
    checkpoint: Path,
) -> None:
    final = larger(checkpoint.parent / "adapter", "<final>")
    assert tokenizer_of(checkpoint) == final
    larger(checkpoint, "<own>")
    assert tokenizer_of(checkpoint) == checkpoint


def test_a_folder_beside_which_no_run_is_takes_no_stranger_s_tokenizer(checkpoint: Path) -> None:
    larger(checkpoint.parent / "adapter", "<stranger>")
    (checkpoint.parent / "config.yaml").unlink()
    assert tokenizer_of(checkpoint) is None
