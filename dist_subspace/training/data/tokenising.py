"""One source from its records to its pieces: here, or in several processes where it takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.pieces import RECORDS, Pieces, tokenised
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.sources import Source
from dist_subspace.training.data.workers import MOST, Workers, free_cores

PATIENCE = 1.0
"""Seconds of tokenising here before other processes are started, which take as long to come up (measured: 0.6 of processor time,
and what the tokenizer's own files take)."""


class Tokenising:
    """The pieces of a source that are not there yet, in the order of its records."""

    def __init__(
        self,
        source: Source,
        settings: DataSettings,
        tokenizer: Any,
        digest: str,
        pieces: Pieces,
        poll: Callable[[], None],
        advance: Callable[[int], None],
    ) -> None:
        self.source, self.settings, self.tokenizer, self.digest = source, settings, tokenizer, digest
        self.pieces, self.poll, self.advance = pieces, poll, advance
        self.encoder = Encoder(tokenizer)

    def run(self) -> int:
        """Tokenise what is missing; returns how many pieces the source has.

        Raises:
            UsageError: a record cannot be used, or a process that helped has died. What is done is kept.
            OSError: the pieces cannot be written.
        """
        self.pieces.open()
        count, began = 0, time.monotonic()
        workers: Workers | None = None
        try:
            for number, records in enumerate(_batches(self.source.read())):
                self.poll()
                count = number + 1
                if self.pieces.has(number):
                    self.advance(len(records))
                    continue
                if workers is None and time.monotonic() - began > PATIENCE and free_cores() > 1:
                    workers = self._started_workers()
                self._tokenise(number, records, workers)
            if workers is not None:
                workers.finish(self.poll)
        finally:
            if workers is not None:
                workers.close()
        return count

    def _tokenise(self, number: int, records: list[dict[str, Any]], workers: Workers | None) -> None:
        first = number * RECORDS + 1
        is_handed_over = workers is not None and workers.has_room and workers.give(number, first, records, self.poll)
        if not is_handed_over:
            self._tokenise_here(number, first, records, workers)
        self.advance(len(records))

    def _tokenise_here(self, number: int, first: int, records: list[dict[str, Any]], workers: Workers | None) -> None:
        try:
            self.pieces.put(number, tokenised(records, first, self.source.name, self.settings, self.encoder))
        except UsageError:
            if workers is not None:
                workers.finish(self.poll)  # a record before it may be refused as well: the first one is said
            raise

    def _started_workers(self) -> Workers:
        count = min(free_cores() - 1, MOST)  # this process tokenises too, where they have enough to do
        # Their files lie with the pieces: what a killed run leaves goes with these.
        put, folder = self.pieces.put, self.pieces.folder
        return Workers(self.settings, self.tokenizer, self.digest, self.source.name, count, put, folder)


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(records, RECORDS)):
        yield batch
