"""Tokenising in several processes, and going on where a run was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dist_subspace.errors import UsageError
from dist_subspace.training.data import DataSettings, prepare
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.fingerprint import tokenizer_digest
from dist_subspace.training.data.pieces import RECORDS, tokenised
from dist_subspace.training.data.workers import Workers
from tests.training.data.chat_for_tests import chat_tokenizer
from tests.training.data.tokens_for_tests import CountingTokenizer, char_tokenizer, prepared

SETTINGS = DataSettings(train="a.jsonl", format="chat", max_length=60)


def talks(count: int) -> list[dict[str, Any]]:
    pairs = [
        ("user", "the w{}q fox"),
        ("assistant", "jumps {}"),
        ("user", "and"),
        ("assistant", " then {} "),
        ("user", "no"),
    ]
    return [{"messages": [{"role": r, "content": c.format(n)} for r, c in pairs[: 1 + n % 5]]} for n in range(count)]


def nothing() -> None:
    return None


def until(condition: Callable[[], bool], patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer("byte-level", "qwen3")


@pytest.fixture
def started(tokenizer: Any) -> Iterator[Callable[..., Workers]]:
    """Starts workers, and ends them."""
    running: list[Workers] = []

    def start(put: Callable[[int, bytes], None], count: int = 2) -> Workers:
        workers = Workers(SETTINGS, tokenizer, tokenizer_digest(tokenizer), "a.jsonl", count, put)
        running.append(workers)
        until(lambda: workers.ready)
        return workers

    yield start
    for workers in running:
        workers.close()


def test_workers_give_the_bytes_that_this_process_gives_and_the_first_refusal(
    started: Callable[..., Workers], tokenizer: Any
) -> None:
    found: dict[int, bytes] = {}
    workers = started(found.__setitem__)
    for process in workers.processes:  # torch takes longer to come up than most sources to tokenise
        assert b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes()
    rows = talks(600)
    for number in range(6):
        assert workers.give(number, number * 100 + 1, rows[number * 100 :][:100], nothing)
    bad = [{"messages": [{"role": "user", "content": 5}]}]
    with pytest.raises(UsageError, match=r"a\.jsonl: record 601 .*int"):
        for number in range(6, 10):
            workers.give(number, number * 100 + 1, bad, nothing)
        workers.finish(nothing)
    encoder = Encoder(tokenizer)
    for number in range(6):
        expected = tokenised(rows[number * 100 :][:100], number * 100 + 1, "a.jsonl", SETTINGS, encoder)
        assert found[number] == expected


class Forgetful(PreTrainedTokenizerFast):
    """Its files are those of another tokenizer, as where a program changes one in ways that no file has."""

    def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return char_tokenizer(eos=False).save_pretrained(folder, *args, **kwargs)


def test_a_tokenizer_that_comes_back_otherwise_from_its_files_works_here_alone() -> None:
    tokenizer = char_tokenizer(Forgetful)
    workers = Workers(SETTINGS, tokenizer, tokenizer_digest(tokenizer), "a.jsonl", 1, lambda *_: None)
    try:
        until(lambda: workers.ready or not workers._left)
        assert not workers.ready
        assert not workers.give(0, 1, talks(2), nothing)
    finally:
        workers.close()


def test_a_worker_that_dies_is_one_sentence(started: Callable[..., Workers]) -> None:
    workers = started(lambda number, piece: None, count=1)
    os.kill(workers.processes[0].pid, signal.SIGKILL)
    with pytest.raises(UsageError, match=r"a\.jsonl: a process that tokenised it ended \(status -9\)"):
        for number in range(8):
            workers.give(number, 1, talks(20), nothing)
        workers.finish(nothing)


PARENT = """
import sys, time
from tests.training.data.test_tokenising import *
tokenizer = chat_tokenizer("byte-level", "qwen3")
workers = Workers(SETTINGS, tokenizer, tokenizer_digest(tokenizer), "a.jsonl", 1, lambda number, piece: None)
until(lambda: workers.ready)
print(*[process.pid for process in workers.processes], flush=True)
time.sleep(600)
"""


def test_workers_end_with_the_process_that_started_them() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    said = next(line for line in parent.stdout if line.strip())  # libraries print blank lines
    pids = [int(pid) for pid in said.split()]
    assert len(pids) == 1
    parent.kill()
    parent.wait()
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and _runs(pid) for pid in pids), 60)


def _runs(pid: int) -> bool:
    try:
        return b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def lines(path: Path, count: int, word: str = "text") -> str:
    path.write_text("\n".join(json.dumps({"text": f"{word} {n}"}) for n in range(count)))
    return str(path)


class Stopped(Exception):
    pass


def stopping(after: int) -> Callable[[], None]:
    """A poll that stops the run at its call number `after`."""
    calls = iter(range(after))

    def poll() -> None:
        if next(calls, None) is None:
            raise Stopped

    return poll


def test_a_stopped_tokenisation_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = DataSettings(train=lines(tmp_path / "a.jsonl", 4 * RECORDS + 7), format="text")
    tokenizer = char_tokenizer(CountingTokenizer)
    arguments = (settings, tokenizer, tmp_path / "cache", 0, False, "causal-lm")
    with pytest.raises(Stopped):
        prepare(*arguments, poll=stopping(3))
    before = CountingTokenizer.calls
    found = prepare(*arguments)
    assert CountingTokenizer.calls - before <= 2 * RECORDS + 7 + 8  # not the three pieces that were there
    whole = prepare(*arguments[:2], tmp_path / "other", *arguments[3:])
    assert len(found.train) == len(whole.train) == 4 * RECORDS + 7
    for name in ("ids", "offsets", "records", "seen"):
        one, other = (getattr(data.train.parts[0].columns, name) for data in (found, whole))
        assert np.array_equal(one, other)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the pieces are gone


def test_pieces_of_another_file_tokenizer_or_setting_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    base: dict[str, Any] = {"train": lines(file, 2 * RECORDS), "format": "text"}
    arguments = (char_tokenizer(), tmp_path / "cache", 0, False, "causal-lm")
    with pytest.raises(Stopped):
        prepare(DataSettings(**base), *arguments, poll=stopping(1))
    other = prepare(DataSettings(**base | {"max_length": 4}), *arguments)
    assert other.train.lengths.max() == 4
    lines(file, 2 * RECORDS, "word")
    changed = prepare(DataSettings(**base), *arguments)
    ids, _ = changed.train.sample(0)
    assert "".join(char_tokenizer().convert_ids_to_tokens(ids.tolist())) == "<s>word 0</s>"


def test_a_piece_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", 2 * RECORDS + 1)
    arguments = (DataSettings(train=file, format="text"), char_tokenizer(), tmp_path / "cache", 0, False, "causal-lm")
    with pytest.raises(Stopped):
        prepare(*arguments, poll=stopping(2))
    (parts,) = (tmp_path / "cache").iterdir()
    piece = sorted(parts.iterdir())[0]
    piece.write_bytes(piece.read_bytes()[:100])
    assert len(prepare(*arguments).train) == 2 * RECORDS + 1


def test_a_large_source_is_tokenised_by_several_processes_into_the_same_columns(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_subspace.training.data import tokenising

    given: list[int] = []

    class Watched(Workers):
        """Workers that are there before the source ends, and say what they were given."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            until(lambda: self.ready)

        def give(self, number: int, *rest: Any) -> bool:
            given.append(number)
            return super().give(number, *rest)

    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, talks(3 * RECORDS))))
    settings: dict[str, Any] = {"train": str(file), "format": "chat", "max_length": 60}
    alone = prepared(tmp_path, tokenizer, **settings)
    monkeypatch.setattr(tokenising, "PATIENCE", 0.0)
    monkeypatch.setattr(tokenising, "free_cores", lambda: 2)
    monkeypatch.setattr(tokenising, "Workers", Watched)
    several = prepare(DataSettings(**settings), tokenizer, tmp_path / "b", 0, False, "causal-lm")
    assert given[:2] == [0, 1]  # the third one too, or here, if they have enough to do
    for name in ("ids", "trained", "offsets", "records", "seen", "dropped"):
        one, other = (getattr(found.train.parts[0].columns, name) for found in (alone, several))
        assert np.array_equal(one, other)


def test_the_first_record_that_is_refused_is_said_whoever_reads_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_subspace.training.data import tokenising

    class Few(Workers):
        """A worker that is there before the source ends, and takes the first piece only."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            until(lambda: self.ready)
            self.given = 0

        @property
        def has_room(self) -> bool:
            return not self.given

        def give(self, *arguments: Any) -> bool:
            self.given += 1
            return super().give(*arguments)

    records = talks(2 * RECORDS)
    records[RECORDS - 1] = records[RECORDS] = {"messages": [{"role": "user", "content": 5}]}
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(tokenising, "PATIENCE", 0.0)
    monkeypatch.setattr(tokenising, "free_cores", lambda: 2)
    monkeypatch.setattr(tokenising, "Workers", Few)
    with pytest.raises(UsageError, match=f"record {RECORDS} "):
        prepared(tmp_path, tokenizer, train=str(file), format="chat", max_length=60)
