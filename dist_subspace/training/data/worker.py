"""A process that tokenises pieces for another one: `python -m dist_subspace.training.data.worker FOLDER PIPE`.

FOLDER holds the tokenizer and `task.json`. Tasks come as lines of JSON on standard input, and what becomes of each goes
back as one frame through the file descriptor PIPE (libraries print to standard output what they like). When the input
ends, which it does when the other process is gone, so does this one.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

PIECE, REFUSED, READY = b"P", b"R", b"+"
HEADER = struct.Struct("<cQ")  # kind, bytes that follow


def send(stream: BinaryIO, kind: bytes, body: bytes) -> None:
    stream.write(HEADER.pack(kind, len(body)) + body)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """The next frame; None where the other side has ended."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    kind, length = HEADER.unpack(header)
    body = stream.read(length)
    return (kind, body) if len(body) == length else None


def _tokenizer(folder: Path, module: str, name: str) -> Any:
    """The tokenizer, by the class that it has in the other process: finding the class out from its files takes torch."""
    try:
        return getattr(importlib.import_module(module), name).from_pretrained(str(folder), local_files_only=True)
    except Exception:  # a class that is not at home in a module, or does not read what it wrote
        return None


def main(folder: Path, tasks: BinaryIO, answers: BinaryIO) -> None:
    from dist_subspace.errors import UsageError
    from dist_subspace.training.data.encoding import Encoder
    from dist_subspace.training.data.fingerprint import tokenizer_digest
    from dist_subspace.training.data.pieces import tokenised
    from dist_subspace.training.data.settings import DataSettings

    task: dict[str, Any] = json.loads((folder / "task.json").read_text("utf-8"))
    tokenizer = _tokenizer(folder, *task["class"])
    if tokenizer is None or tokenizer_digest(tokenizer) != task["tokenizer"]:
        return  # a tokenizer that does not come back from its files the same is used where it is
    settings, encoder = DataSettings(**task["settings"]), Encoder(tokenizer)
    send(answers, READY, b"")
    for line in tasks:
        request = json.loads(line)
        try:
            send(answers, PIECE, tokenised(request["records"], request["first"], task["source"], settings, encoder))
        except UsageError as error:
            send(answers, REFUSED, str(error).encode())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.stdin.buffer, os.fdopen(int(sys.argv[2]), "wb"))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
