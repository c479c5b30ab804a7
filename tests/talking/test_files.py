"""A file is answered in its order, on any number of ranks, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.adapted.opened import open_adapted
from dist_subspace.errors import UsageError
from dist_subspace.generation.settings import greedy
from dist_subspace.stopping import STOP
from dist_subspace.talking.files import answer_file, read_prompts
from dist_subspace.talking.options import Asked
from dist_subspace.training.data.prompting import Prompting
from dist_subspace.training.data.settings import DataSettings
from tests.ranks import run_on_ranks
from tests.talking.folders import run_folder
from tests.tiny_run import make_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rows = [{"instruction": f"say {n}" * (1 + n % 3), "answer": n} for n in range(7)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_folder(folder)


def answer(run: str, out: str, preset: str | None, stop_after: int | None = None) -> bool:
    """Collective: the file beside the run, answered; a stop is told when so many answers are there."""
    asked = Asked(run, input=f"{run}/../asked.jsonl", output=out, batch_size=2, compare_base=True)
    opened = open_adapted(run, preset=preset)
    prompting = Prompting(opened.settings(), opened.tokenizer)

    def progress(done: int, total: int) -> None:
        if done == stop_after:
            STOP.tell("a test")

    try:
        return answer_file(asked, opened, prompting, greedy(opened.model, max_new_tokens=6), progress)
    finally:
        STOP.reset()
        opened.close()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_record_has_its_answer_in_order_and_ranks_go_on_where_one_process_stopped(
    run: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    assert answer(str(run), str(whole), None)
    made = lines(whole)
    assert [row["answer"] for row in made] == list(range(7))
    assert {"generated_text", "finish_reason", "base_generated_text", "base_finish_reason"} < made[0].keys()
    assert [r["generated_text"] for r in made] != [r["base_generated_text"] for r in made]
    assert not answer(str(run), str(tmp_path / "out.jsonl"), "none", stop_after=4)
    assert len(lines(tmp_path / "out.jsonl.partial")) == 4 and not (tmp_path / "out.jsonl").exists()
    assert run_on_ranks(2, answer, str(run), str(tmp_path / "out.jsonl"), None) == [True, True]
    assert lines(tmp_path / "out.jsonl") == made, "two ranks, split as in training, have written the rest"


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    chat = Prompting(DataSettings(train="", format="chat"), make_tokenizer())
    (tmp_path / "asked.txt").write_text("Hi.\n\nWho?\n")
    records, prompts, _ = read_prompts(str(tmp_path / "asked.txt"), chat, "Be kind.")
    assert [record["messages"][-1]["content"] for record in records] == ["Hi.", "Who?"]
    assert all("Be kind." in prompt.text for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "is '.*a.jsonl', an empty file"),
        ("a.json", "[]", "a.json holds no records"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x", "generated_text": "y"}\n', "has a column 'generated_text' already"),
        ("a.jsonl", '{"text": "x"}\n', "record 1 has no column 'prompt'"),
        ("a.pdf", "x", "of an unknown kind"),
    ],
)
def test_a_file_without_prompts_is_refused_in_a_sentence(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    completion = Prompting(DataSettings(train="", format="completion"), make_tokenizer())
    with pytest.raises(UsageError, match=said):
        read_prompts(str(tmp_path / name), completion)
