"""Cases in processes of their own, forked from one that has imported everything: a crash or a hang ends one case."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.families.cases import Case
from tests.forked import renew_threads

TIMEOUT = 60.0  # seconds a case


@dataclass
class Result:
    """verdict: right, refused (with one sentence), wrong, or unmade (transformers itself cannot make or run the model)."""

    name: str
    verdict: str
    stage: str = ""
    text: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # the stages that were not right

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(case: Case) -> Result:
    """The verdict on one case, in this process: its floats, one packed storage, and an adapter on it."""
    work = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        return examined(case, work, [storage_of(case)], adapter=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def storage_of(case: Case) -> str:
    """nf4 and int8 by turns."""
    return ("nf4", "int8")[sum(map(ord, case.name)) % 2]


def examined(case: Case, work: Path, storages: Sequence[str], *, adapter: bool) -> Result:
    """The verdict on a case in these packed storages. `work` is left with the folder `model` and, for each storage, the right
    logits for what `given.pt` holds."""
    import torch

    from dist_subspace.errors import UsageError
    from tests.families import checks

    began, verdicts = time.monotonic(), []
    try:
        session = checks.begin(case, work / "model")
    except Exception as error:
        return Result(case.name, "unmade", "transformers", _said(error), time.monotonic() - began)
    torch.save(session.given, work / "given.pt")

    def packed(storage: str) -> None:
        torch.save(checks.check_quantised(session, storage), work / f"{storage}.pt")

    stages: list[tuple[str, Callable[[], None]]] = [
        ("fp32", lambda: checks.check_float(session)),
        ("bf16", lambda: checks.check_types(session)),
        *((storage, functools.partial(packed, storage)) for storage in storages),
    ]
    stages += [("lora", lambda: checks.check_adapter(session, work))] if adapter else []
    for stage, act in stages:
        try:
            act()
        except UsageError as error:
            verdicts.append((checks.verdict_on(error, stage, session), stage, str(error)))
            if stage == "fp32":
                break
        except checks.Wrong as error:
            verdicts.append(("wrong", stage, str(error)))
        except Exception as error:
            verdicts.append(("wrong", stage, _said(error)))
    worst = min(verdicts, key=lambda v: ("wrong", "refused").index(v[0]), default=("right", "", ""))
    text = " | ".join(f"[{stage}] {said}" for verdict, stage, said in verdicts if verdict == worst[0])
    notes = [
        *session.notes,
        *(f"{verdict} [{stage}] {said}" for verdict, stage, said in verdicts if verdict != worst[0]),
    ]
    seconds, failed = time.monotonic() - began, [stage for _, stage, _ in verdicts]
    return Result(case.name, worst[0], worst[1], text, seconds, notes, session.distances, session.dense, failed)


def _said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"


def run(
    cases: Iterable[Case],
    workers: int = 1,
    timeout: float = TIMEOUT,
    report: Callable[[Result], None] | None = None,
    examine: Callable[[Case], Result] = check,
) -> list[Result]:
    """The verdicts, in the order of the cases."""
    warm_up()
    context = multiprocessing.get_context("fork")
    waiting, running, results = list(cases), {}, {}
    order = [case.name for case in waiting]
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(case, theirs, examine))
            process.start()
            theirs.close()
            running[ours] = (case, process, time.monotonic())
        ready = wait(list(running), timeout=0.5)
        for pipe in list(running):
            case, process, began = running[pipe]
            late = time.monotonic() - began > timeout
            if pipe not in ready and not late:
                continue
            result = _result(case, pipe if pipe in ready else None, process, timeout)
            del running[pipe]
            results[case.name] = result
            if report is not None:
                report(result)
    return [results[name] for name in order]


def _result(case: Case, pipe: Connection | None, process: Any, timeout: float) -> Result:
    if pipe is None:
        process.kill()
        process.join()
        return Result(case.name, "wrong", "time", f"nothing after {timeout:g} seconds", timeout)
    try:
        result: Result = pipe.recv()
    except EOFError:
        process.join()
        return Result(case.name, "wrong", "crash", f"the process ended with status {process.exitcode}")
    process.join()
    return result


def _work(case: Case, pipe: Connection, examine: Callable[[Case], Result]) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    renew_threads()
    pipe.send(examine(case))
    pipe.close()
    os._exit(0)


def warm_up() -> None:
    """Everything that a case imports, before the first fork."""
    import torch
    import transformers

    for module in ("dist_subspace.api", "dist_subspace.interchange.merge", "tests.families.checks"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gc.freeze()  # what is here now is never collected in a fork, nor copied for it
