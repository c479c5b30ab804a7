"""Reading ahead: in order, a bounded number of pieces, an error in its place, and no thread that outlives its block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_subspace.errors import UsageError
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.loading.read_ahead import BUFFERS, ReadAhead, Wanted

CPU = torch.device("cpu")
WHOLE = torch.arange(1000.0)
LAYOUT = Layout.of("a", (1000,))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[RangeReader]:
    save_file({"a": WHOLE}, tmp_path / "model.safetensors")
    with RangeReader(open_checkpoint(tmp_path)) as reader:
        yield reader


def pieces(count: int, asked: list[int] | None = None) -> Iterator[Wanted[int]]:
    for number in range(count):
        if asked is not None:
            asked.append(number)
        yield Wanted(number, LAYOUT, 10 * number, 10 * number + 7)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name]


def test_pieces_come_in_order_and_stay_until_the_next(reader: RangeReader) -> None:
    with ReadAhead(reader, pieces(40), CPU) as ahead:
        for number, (wanted, values) in enumerate(ahead):
            time.sleep(0.002)  # the reader is far ahead by now, were it not bounded
            assert wanted.what_for == number and torch.equal(values, WHOLE[wanted.start : wanted.stop])
    assert number == 39 and reader.index.bytes_read.total == 40 * 7 * 4


def test_it_is_a_few_pieces_ahead_and_no_more(reader: RangeReader) -> None:
    asked: list[int] = []
    with ReadAhead(reader, pieces(40, asked), CPU) as ahead:
        coming = iter(ahead)
        next(coming)
        deadline = time.monotonic() + 20
        while len(asked) <= BUFFERS and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(asked) == BUFFERS + 1  # the last of them waits for a buffer
        assert reader.index.bytes_read.total == BUFFERS * 7 * 4
    assert readers() == []


def test_an_error_comes_in_the_place_of_its_piece_and_once(reader: RangeReader) -> None:
    file = reader.index.folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(reader.index.spans["a"][0] + 4 * 100)
    seen = []
    with pytest.raises(UsageError, match=r"cut short: it ends within a;"), ReadAhead(reader, pieces(40), CPU) as ahead:
        for wanted, _ in ahead:
            seen.append(wanted.what_for)
    assert seen == list(range(10)) and readers() == []


def test_who_leaves_early_leaves_no_thread(reader: RangeReader) -> None:
    with pytest.raises(ZeroDivisionError), ReadAhead(reader, pieces(40), CPU) as ahead:
        for _ in ahead:
            raise ZeroDivisionError
    assert readers() == []
    with ReadAhead(reader, pieces(0), CPU) as ahead:
        assert list(ahead) == []
