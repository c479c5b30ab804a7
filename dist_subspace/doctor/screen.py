"""What libraries write while the doctor looks at them does not stand between the lines of its table, nor in its JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def to_itself() -> Iterator[tuple[TextIO, TextIO]]:
    """The process's output and errors go into a file that nobody sees, those of C++ code too; what is written to the two
    streams that are given goes where output and errors went."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with tempfile.TemporaryFile() as unseen, _stream(kept[0]) as out, _stream(kept[1]) as errors:
            for number in (1, 2):
                os.dup2(unseen.fileno(), number)
            yield out, errors
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def _stream(descriptor: int) -> TextIO:
    """A stream of its own that ends a line at once, where the descriptor leads to."""
    return os.fdopen(os.dup(descriptor), "w", buffering=1)
