"""A file of answers goes on where it stopped, and never with the answers to something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.talking.answer_file import AnswerFile


def test_it_appears_whole_and_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path, asked = tmp_path / "out.jsonl", {"seed": 1, "ends": (1, 2)}
    first = AnswerFile(path, asked)
    first.append([{"a": 1}, {"a": "é"}])
    with first.partial.open("ab") as file:
        file.write(b'{"a": 3')  # a process that was killed
    second = AnswerFile(path, asked)
    assert second.done == 2 and not path.exists()
    second.append([{"a": 3}])
    second.finish()
    assert [json.loads(line)["a"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, "é", 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(UsageError, match="is there already; accepted: a new file"):
        AnswerFile(path, asked)


def test_another_question_is_refused_by_what_differs(tmp_path: Path) -> None:
    AnswerFile(tmp_path / "out.jsonl", {"seed": 1, "storage": "nf4"}).append([{"a": 1}])
    with pytest.raises(UsageError, match=r"out\.jsonl\.partial was begun with seed 1, and not 2"):
        AnswerFile(tmp_path / "out.jsonl", {"seed": 2, "storage": "nf4"})
    (tmp_path / "out.jsonl.partial.json").unlink()
    with pytest.raises(UsageError, match="which says what it answers, cannot be read"):
        AnswerFile(tmp_path / "out.jsonl", {"seed": 1})


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in a folder that is not there"):
        AnswerFile(tmp_path / "none" / "out.jsonl", {})
