"""What libraries write while the doctor looks at them does not stand between the lines of its table, nor in its JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def to_itself() -> Iterator[TextIO]:
    """The process's output and errors go into a file that nobody sees, those of C++ code too; what is written to the stream that
    is given goes where the output went."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with tempfile.TemporaryFile() as unseen, os.fdopen(os.dup(kept[0]), "w") as screen:
            for number in (1, 2):
                os.dup2(unseen.fileno(), number)
            yield screen
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
