"""The command: all ranks examine themselves, meet, look at each other, and rank 0 says what was found."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from typing import Any, NoReturn, TextIO

from dist_subspace.doctor import attendance, clocks, disks, network, report, screen
from dist_subspace.doctor.examination import Asked, examine_self, guarded, who
from dist_subspace.doctor.findings import Finding, worst_first
from dist_subspace.doctor.kinds import judge_all
from dist_subspace.doctor.launcher_hosts import expected_host
from dist_subspace.doctor.meeting import Meeting, NotHeard, OwnStore
from dist_subspace.doctor.ranks import Facts, Ranks, is_failure
from dist_subspace.errors import UsageError
from dist_subspace.launchers import Place, enter, is_first

LATER = 15.0  # seconds that another rank waits longer, so that rank 0 is the first to say what is wrong
OPENING = 60.0  # seconds more in which rank 0, once all were started, has imported torch
LOOKING = 120.0  # seconds to look at each other
COLLECTIVE = 60.0  # seconds for one collective
AT_ALL = 3600.0  # seconds in which rank 0 decides
HEARING = 5.0  # seconds in which the others hear that it is over


def doctor(config: str | None, overrides: list[str], as_json: bool, patience: float) -> NoReturn:
    """Collective where a launcher has started several ranks. Ends the process, with 0 or 1 on all ranks alike: a call that hangs
    would not let it end by itself."""
    place = enter()  # before torch is imported, which looks at the devices
    if not place.is_alone and place.address is None:
        raise UsageError("MASTER_ADDR is not set; accepted: MASTER_ADDR, the host of rank 0, for every rank")
    if is_first():
        print("examining", file=sys.stderr, flush=True)
    with screen.to_itself() as (out, errors):
        status = _examine(place, Asked(config, tuple(overrides)), as_json, patience, out, errors)
    os._exit(status)


def _examine(place: Place, asked: Asked, as_json: bool, patience: float, out: TextIO, errors: TextIO) -> int:
    began = time.monotonic()
    try:
        meeting, store = _meet(place, patience)
        if (first := meeting.sign(who(place))) is not None and first["pid"] != os.getpid():
            meeting.tell("double", who(place))
            return int(meeting.hear("verdict", AT_ALL))
        return _Doctor(meeting, store, place, patience).run(asked, as_json, out)
    except UsageError as error:  # rank 0 is not reached, or cannot be met
        print(f"error: {error}", file=errors)
    except ImportError as error:
        print(
            f"error: {who(place)['host']}: {error} (with {sys.executable}), and without torch no rank can meet",
            file=errors,
        )
    except Exception as error:  # the store has ended with rank 0
        print(
            f"error: rank {place.rank} lost rank 0 after {time.monotonic() - began:.0f} seconds: {error}", file=errors
        )
    return 1


def _meet(place: Place, patience: float) -> tuple[Meeting, Any]:
    """The meeting, and the store of torch below it (None where this process is alone)."""
    if place.is_alone:
        return Meeting(OwnStore(), 0, 1), None
    from dist_subspace.placement.store import attempt, open_store

    waits = patience + (LATER if place.rank else 0.0)
    store = open_store(place, time.monotonic() + waits, waits)
    return Meeting(store, place.rank, place.size, attempt()), store


class _Doctor:
    """One rank's way through the meeting: its own facts, a look at the others, the collectives, the verdict."""

    def __init__(self, meeting: Meeting, store: Any, place: Place, patience: float) -> None:
        self._meeting, self._store, self._place, self._patience = meeting, store, place, patience
        self._roll = attendance.Attendance(meeting, patience)
        self._facts: dict[int, Facts] = {}  # rank 0's

    def run(self, asked: Asked, as_json: bool, out: TextIO) -> int:
        token = self._agreed_token()
        own = examine_self(self._place, asked, token, lambda name, limit: self._meeting.tell("stage", [name, limit]))
        listener = self._listen(own)
        try:
            self._meeting.tell("facts", own)
            plan = self._agree("plan", lambda: self._gathered("facts", self._roll.gather()), self._plan)
            if self._meeting.rank not in plan["ranks"]:
                raise NotHeard("this rank answered too late")
            self._say_and_gather("looks", self._look(own, plan, token), plan["ranks"], LOOKING)
            group = self._agree("group", lambda: None, self._group)  # all have looked by then
        finally:
            if isinstance(own.get("disks"), list):
                disks.remove_marks(own["disks"], token, self._meeting.rank)
            if listener is not None:
                listener.close()
        limit = LOOKING + COLLECTIVE * len(plan["nodes"])
        self._say_and_gather("traffic", self._measure(group, limit), plan["ranks"], limit + COLLECTIVE)
        return self._conclude(as_json, out)

    def _agreed_token(self) -> str:
        if self._meeting.is_chair:
            self._meeting.announce("token", disks.new_token())
        return str(self._meeting.hear("token", self._patience + OPENING))

    def _agree(self, what: str, before: Any, decide: Any) -> Any:
        """Rank 0 decides, once it has heard the others; all hear it."""
        if self._meeting.is_chair:
            before()
            self._meeting.announce(what, decide())
        return self._meeting.hear(what, AT_ALL)

    def _gathered(self, what: str, found: dict[int, Any]) -> None:
        """Rank 0: what ranks have told becomes part of their facts; a mapping's parts by their names."""
        for rank, value in found.items():
            if what == "facts":
                self._facts[rank] = value
            elif what == "looks":
                self._facts[rank] |= value
            elif value is not None:
                self._facts[rank][what] = value

    def _say_and_gather(self, what: str, value: Any, ranks: list[int], limit: float) -> None:
        self._meeting.tell(what, {"said": value})
        if self._meeting.is_chair:
            deadline = time.monotonic() + limit
            found = self._meeting.gather(what, ranks, lambda waiting: time.monotonic() < deadline)
            self._gathered(what, {rank: word["said"] for rank, word in found.items()})

    def _listen(self, own: Facts) -> network.Listener | None:
        """The first rank of a node lets the other nodes try to reach it."""
        seen = own.get("network")
        if self._place.is_alone or seen is None or is_failure(seen) or seen["address"] is None:
            return None
        try:
            listener = network.Listener(seen["address"])
        except OSError as error:  # the host's name is an address that is no card's
            seen |= {"address": "127.0.0.1", "how": f"{seen['address']} is no card's here: {error.strerror}"}
            return None
        seen["ports"] = listener.ports
        return listener

    def _plan(self) -> dict[str, Any]:
        """Rank 0: who takes part in what follows, and where each node is reached."""
        ranks = Ranks(self._facts, self._meeting.size)
        seen, firsts = ranks.of("network"), list(ranks.firsts().values())
        reach = {
            str(rank): [seen[rank]["address"], seen[rank]["ports"]]
            for rank in firsts
            if seen.get(rank, {}).get("ports")
        }
        return {"ranks": list(ranks.facts), "nodes": firsts, "reach": reach if len(firsts) > 1 else {}}

    def _look(self, own: Facts, plan: dict[str, Any], token: str) -> Facts:
        """What this rank sees of the others: their marks on the disks, their ports, rank 0's clock."""
        rank, nodes = self._meeting.rank, plan["nodes"]
        found: Facts = {}
        if rank not in nodes:
            return found
        others = [node for node in nodes if node != 0]
        if rank == 0:
            clocks.serve(self._meeting, others)
        elif (ahead := clocks.ask(self._meeting, others.index(rank))) is not None:
            found[clocks.KIND] = ahead
        if isinstance(own.get("disks"), list) and len(nodes) > 1:
            found["marks"] = guarded(disks.marks_seen, own["disks"], token, nodes, limit=LOOKING / 2)
        targets = {int(other): tuple(where) for other, where in plan["reach"].items() if int(other) != rank}
        if targets:
            found["links"] = guarded(network.reach, targets, limit=LOOKING / 2)
        return found

    def _group(self) -> dict[str, Any] | None:
        """Rank 0: the ranks that make a process group: all that answered, but those of nodes that do not reach each other."""
        ranks = Ranks(self._facts, self._meeting.size)
        nodes, seen = largest_whole(list(ranks.firsts().values()), ranks.of("links")), ranks.of("devices")
        members = [rank for rank in ranks.facts if ranks.firsts()[ranks.host(rank)] in nodes and rank in seen]
        if not members or 0 not in members:
            return None
        on_cuda = all(seen[rank]["own"]["type"] == "cuda" for rank in members)
        own = [seen[rank]["own"].get("uuid") or str(rank) for rank in members]
        backend = "nccl" if on_cuda and len(set(own)) == len(own) else "gloo"
        first = [node for node in nodes if node in members]
        return {"ranks": members, "nodes": first, "backend": backend, "prefix": f"{self._meeting.prefix}/group"}

    def _measure(self, group: dict[str, Any] | None, limit: float) -> Any:
        if group is None or self._meeting.rank not in group["ranks"]:
            return None
        from dist_subspace.doctor import traffic

        return guarded(traffic.measure, group, self._meeting.rank, self._store, COLLECTIVE, limit=limit)

    def _conclude(self, as_json: bool, out: TextIO) -> int:
        """Rank 0 says what was found; then all leave with its status: a launcher ends all with the first that fails."""
        if not self._meeting.is_chair:
            status = int(self._meeting.hear("verdict", AT_ALL))
            self._meeting.tell("heard", True)
            return status
        ranks = Ranks(self._facts, self._meeting.size)
        absent = attendance.judge(ranks, self._meeting, expected_host, self._patience)
        findings = worst_first([*absent, *judge_all(ranks)])
        print(_said(ranks, findings, as_json), file=out, flush=True)
        status = int(any(found.breaks for found in findings))
        self._meeting.announce("verdict", status)
        deadline = time.monotonic() + HEARING
        self._meeting.gather(
            "heard", [rank for rank in self._facts if rank], lambda waiting: time.monotonic() < deadline
        )
        return status


def largest_whole(nodes: list[int], links: dict[int, Any]) -> list[int]:
    """The nodes without those that do not reach the others, or are not reached: one by one, those with the most closed links."""
    left = list(nodes)
    while left:
        closed = {
            node: sum(
                not network.reached(links.get(a, {}), b)
                for other in left
                if other != node
                for a, b in ((node, other), (other, node))
            )
            for node in left
        }
        worst = max(reversed(left), key=lambda node: closed[node])
        if not closed[worst]:
            return left
        left.remove(worst)
    return left


def _said(ranks: Ranks, findings: list[Finding], as_json: bool) -> str:
    if as_json:
        return json.dumps(report.as_json(ranks, findings), indent=2)
    return report.as_text(ranks, findings, shutil.get_terminal_size((120, 24)).columns)
