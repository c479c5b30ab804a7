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


def test_prompts_that_are_too_long_are_named_and_skipped_where_that_is_asked_for(
    run: Path, tmp_path: Path, said: list[str]
) -> None:
    """A stop between them changes nothing; without the option the file is refused."""
    opened = open_adapted(str(run), preset="none")
    prompting = Prompting(opened.settings(), opened.tokenizer)
    rows = [{"instruction": text} for text in ("x" * 200, "a", "b", "x" * 300, "c", "x" * 200)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = greedy(opened.model, max_new_tokens=3)

    def answer_all(name: str, stop_after: int | None = None, **given: Any) -> bool:
        out = str(tmp_path / name)
        asked = Asked(
            str(run), input=str(tmp_path / "asked.jsonl"), output=out, batch_size=1, compare_base=True, **given
        )

        def progress(done: int, total: int) -> None:
            assert total == 3
            if done == stop_after:
                STOP.tell("a test")

        try:
            return answer_file(asked, opened, prompting, settings, progress)
        finally:
            STOP.reset()

    with pytest.raises(UsageError, match=r"prompt 1 has [0-9]+ tokens, and 2 others are too long"):
        answer_all("refused.jsonl")
    assert answer_all("whole.jsonl", skip_long=True)
    made = lines(tmp_path / "whole.jsonl")
    assert [row["instruction"] for row in made] == [row["instruction"] for row in rows]
    nothing = {"generated_text": None, "base_generated_text": None}
    too_long = dict.fromkeys(("finish_reason", "base_finish_reason"), "prompt_too_long")
    assert all(made[number] == rows[number] | nothing | too_long for number in (0, 3, 5))
    assert all(made[number]["generated_text"] is not None for number in (1, 2, 4))
    assert said[-1].startswith("3 of 6 prompts have more than the 127 tokens") and said[-1].endswith(": 1, 4, 6")
    assert not answer_all("parted.jsonl", stop_after=1, skip_long=True)
    assert answer_all("parted.jsonl", skip_long=True) and lines(tmp_path / "parted.jsonl") == made


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
