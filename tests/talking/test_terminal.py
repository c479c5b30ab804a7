"""A chat over a pipe and on a terminal: lines in, answers out, and what Ctrl-C does."""

from __future__ import annotations

import os
import signal

import pytest

from dist_subspace.talking.terminal import Keys


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
