"""A rank that fails alone, in every place where one can: all ranks leave, with one status and one sentence, and nobody waits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_subspace.run_folder.status import read_status
from tests.faults.agreements import CALLS, NO_ROW, RUNS, Row
from tests.faults.calls import make_calls
from tests.faults.injection import FOUND_OUT, SAID, install, say_if_found_out
from tests.faults.places import places
from tests.faults.scenes import Home
from tests.forked_ranks import report, run_ranks

STATUS = {"disk": 1, "json": 1, "kill": 1, "usage": 2}
PATIENCE = 60.0  # seconds; a rank that is gone is missed within ten
APART = 10.0  # seconds between the first rank that leaves and the last


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("agreement"))


def test_every_agreement_and_message_of_the_product_has_a_fault_or_a_reason_why_it_needs_none() -> None:
    known = {row.place for row in (*RUNS, *CALLS)} | set(NO_ROW)
    assert sorted(places().keys() - known) == [], "a place where a rank can fail alone, and no test lets it"
    gone = {
        name for name in known if name.rpartition(" ")[2].startswith(("agreed", "on_", "once")) and name not in places()
    }
    assert sorted(gone | (NO_ROW.keys() - places().keys())) == [], "not in the product any more"


@pytest.mark.parametrize("row", RUNS, ids=str)
def test_a_rank_that_fails_alone_in_a_run_ends_all_with_its_one_sentence(row: Row, home: Home) -> None:
    run = f"run-{RUNS.index(row)}"
    before = {row.rank: (install, row.fault), 1 - row.rank: (say_if_found_out,)}
    ended = home.run(row.scene, run, before=before, limit=PATIENCE)
    shown = report(ended)
    expected = [STATUS[row.kind]] * 2
    if row.kind == "kill":
        expected[row.rank] = -9
    assert [rank.status for rank in ended] == expected, shown
    if row.kind != "kill":
        assert abs(ended[0].seconds - ended[1].seconds) < APART, shown
    sentences = [line for rank in ended for line in rank.errors]
    assert len(sentences) == 1, shown
    status = read_status(home.folder / run)
    if row.kind == "kill":
        assert sentences[0].startswith(f"error: rank {row.rank} (process ") and ended[1 - row.rank].errors, shown
    else:
        assert SAID in sentences[0], shown
        speaker = next(rank.rank for rank in ended if rank.errors)
        assert speaker in (row.rank, 0) if row.kind == "usage" else speaker == row.rank, shown
        assert "Traceback" not in ended[1 - row.rank].output, shown
        assert not (row.agrees and FOUND_OUT in ended[1 - row.rank].output), f"there was no agreement\n{shown}"
    if status is not None:
        state = "refused" if row.kind == "usage" else "failed"
        assert (status["state"], status["message"]) == (state, sentences[0].removeprefix("error: ")), shown


@pytest.fixture(scope="module")
def answers(home: Home) -> list[list[list[Any]]]:
    """What each rank raised in each call, row by row; a row that nobody came to is absent."""
    ended = run_ranks([(make_calls, CALLS, str(home.folder))] * 2, home.folder, limit=2 * PATIENCE)
    print(report(ended))
    lines = [(home.folder / f"calls-{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    return [[json.loads(line) for line in both] for both in zip(*lines, strict=False)]


@pytest.mark.parametrize("row", CALLS, ids=str)
def test_a_rank_that_fails_alone_in_a_call_is_an_error_of_all(row: Row, answers: list[list[list[Any]]]) -> None:
    number = CALLS.index(row)
    assert number < len(answers), f"a rank was waiting still in {CALLS[len(answers)]}, or before"
    own, other = answers[number][row.rank], answers[number][1 - row.rank]
    assert own[2] and other[2], "the group is not whole any more"
    assert SAID in own[1], own
    if row.kind == "usage":
        assert own[:2] == other[:2] == ["UsageError", SAID]
    else:
        assert own[0] in ("OSError", "StorageError", "ValueError") and other[0] == "PeerFailed", (own, other)
        assert f"failed on rank {row.rank}: " in other[1] and SAID in other[1], other
