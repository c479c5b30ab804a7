"""A chat over a pipe and on a terminal: lines in, answers out, and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dist_subspace.adapted.opened import open_adapted
from dist_subspace.generation.settings import greedy
from dist_subspace.talking.chat import Chat
from dist_subspace.talking.terminal import Keys
from dist_subspace.training.data.prompting import Prompting
from tests.talking.folders import run_folder


def test_ctrl_c_is_noted_while_an_answer_is_written_and_twice_it_is_pythons_own() -> None:
    keys, before = Keys(), signal.getsignal(signal.SIGINT)
    with keys.listening():
        assert not keys.pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert keys.pressed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with keys.listening():
        assert not keys.pressed, "another answer begins anew"


def test_an_answer_that_is_stopped_ends_and_the_chat_goes_on(tmp_path: Path) -> None:
    opened = open_adapted(run_folder(tmp_path, "completion"))
    keys, shown, seen = Keys(), [], []  # type: ignore[var-annotated]

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    prompting = Prompting(opened.settings(), opened.tokenizer)
    chat = Chat(opened, prompting, greedy(opened.model, max_new_tokens=60), show, seen.append, lambda: keys.pressed)
    with keys.listening():
        assert chat.heard("hello")
    stopped = len(shown)
    with keys.listening():
        assert chat.heard("again")
    assert stopped < 12 and shown[stopped - 1] == "\n" and len(shown) - stopped > 12 and seen == []
