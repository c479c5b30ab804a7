"""A meeting of the ranks that goes on whoever differs or is absent: what a rank has found reaches rank 0, and what rank 0 decides
reaches all, over the key-value store, without a process group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_LOOK = 0.05  # seconds between two looks


class KeyValues(Protocol):
    """What is asked of a store; that of `torch.distributed` is one."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class OwnStore:
    """The store of a process that is alone; torch is not needed for it."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        return self._values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._values.get(key, "") == expected:
            self._values[key] = desired
        return self._values[key].encode()


class NotHeard(Exception):
    """What rank 0 should have said did not come."""


class Meeting:
    """One rank's part in the meeting. Values are what JSON can hold; `attempt` tells ranks that were started again from those of
    before."""

    def __init__(self, store: KeyValues, rank: int, size: int, attempt: str = "0") -> None:
        self.store, self.rank, self.size = store, rank, size
        self.prefix = f"dist_subspace/doctor/{attempt}"

    @property
    def is_chair(self) -> bool:
        return self.rank == 0

    def tell(self, what: str, value: Any) -> None:
        """Local: this rank's word, for rank 0."""
        self._set(f"{what}/{self.rank}", value)

    def told(self, what: str, rank: int) -> Any | None:
        """Local: a rank's word if it is there already, else None."""
        return self._value(f"{what}/{rank}")

    def gather(self, what: str, ranks: Iterable[int], go_on: Callable[[list[int]], bool]) -> dict[int, Any]:
        """Rank 0: the ranks' words, those that came for as long as `go_on` (given the ranks that are waited for) says so."""
        waiting, found = list(ranks), {}
        while True:
            for rank in list(waiting):
                if (value := self.told(what, rank)) is not None:
                    found[rank] = value
                    waiting.remove(rank)
            if not waiting or not go_on(waiting):
                return found
            time.sleep(_LOOK)

    def announce(self, what: str, value: Any) -> None:
        """Rank 0: a decision, for all."""
        self._set(f"decided/{what}", value)

    def hear(self, what: str, limit: float) -> Any:
        """What rank 0 has decided.

        Raises:
            NotHeard: nothing, for `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while (value := self._value(f"decided/{what}")) is None:
            if time.monotonic() > deadline:
                raise NotHeard(f"rank 0 has said nothing for {limit:g} seconds")
            time.sleep(_LOOK)
        return value

    def sign(self, who: dict[str, Any]) -> dict[str, Any] | None:
        """This rank is here. The one that signed with this number before, where there is one."""
        key, text = f"{self.prefix}/who/{self.rank}", json.dumps({"value": who})
        signed = bytes(self.store.compare_set(key, "", text)).decode()
        return None if signed == text else json.loads(signed)["value"]

    def wait_for_value(self, key: str, limit: float) -> str:
        """A value of the store the moment it is there.

        Raises:
            torch.distributed.DistError: it was not, within `limit` seconds.
        """
        whole = f"{self.prefix}/{key}"
        self.store.wait([whole], timedelta(seconds=limit))  # type: ignore[attr-defined]
        return bytes(self.store.get(whole)).decode()

    def set_value(self, key: str, value: str) -> None:
        self.store.set(f"{self.prefix}/{key}", value)

    def _set(self, key: str, value: Any) -> None:
        self.store.set(f"{self.prefix}/{key}", json.dumps({"value": value}))

    def _value(self, key: str) -> Any | None:
        whole = f"{self.prefix}/{key}"
        if not self.store.check([whole]):
            return None
        return json.loads(bytes(self.store.get(whole)).decode())["value"]
