"""The table of families and storages: logits against transformers, one process and ZeRO-3 on two ranks, and what stays dense.

    python -m tests.families --table [names ...]

A cell is the largest distance of our logits from those of transformers' model with the same weights (in packed storages, with our
own dequantised ones), in units of the largest logit. "share" is what a rank of two keeps of all frozen bytes under ZeRO-3, which
has to be half of each tensor, rounded up; "split" is the distance of the logits that such ranks compute.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.families.cases import Case
from tests.families.runner import Result, examined, run
from tests.ranks import RanksFailed, run_on_ranks

STORAGES = ("nf4", "int8", "fp8")
SPLIT = "nf4"  # how the weights are held that two ranks split
FAR = 3e-4  # of the largest logit: float32 sums in another order
TIMEOUT = 90.0  # seconds of the ranks

HEAD = f"{'verdict':9}{'family':48}" + "".join(f"{name:>9}" for name in ("fp32", "bf16", *STORAGES, "share", "split"))


@dataclass
class Row:
    """result: of one process. share, far: of two ranks; None where no layer takes an adapter, or nothing was loaded."""

    result: Result
    share: float | None = None
    far: float | None = None

    @property
    def cells(self) -> list[str]:
        failed, distances = self.result.failed, self.result.distances
        one = {name: "-" if name in failed else _number(distances.get(name)) for name in ("fp32", *STORAGES)}
        made = bool(distances) and "bf16" not in failed
        return [one["fp32"], "equal" if made else "-", *(one[name] for name in STORAGES)]

    def __str__(self) -> str:
        result, share = self.result, "-" if self.share is None else f"{self.share:.3f}"
        line = f"{result.verdict:9}{result.name:48}" + "".join(
            f"{c:>9}" for c in (*self.cells, share, _number(self.far))
        )
        said = [f"{'':9}{text}" for text in (*filter(None, [result.text]), *map(shortened, result.dense))]
        return "\n".join([line.rstrip(), *said])


def table(cases: Iterable[Case], timeout: float, report: Callable[[Row], None]) -> list[Row]:
    rows = []
    for case in cases:
        rows.append(row_of(case, timeout))
        report(rows[-1])
    return rows


def row_of(case: Case, timeout: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="family-") as folder:
        work = Path(folder)
        examine = functools.partial(examined, work=work, storages=STORAGES, adapter=False)
        (result,) = run([case], 1, timeout, None, examine)
        row = Row(result)
        if result.verdict in ("right", "refused") and (work / f"{SPLIT}.pt").exists():
            _split(row, case, work)
        return row


def _split(row: Row, case: Case, work: Path) -> None:
    """Ask two ranks; what they find wrong becomes the row's verdict."""
    try:
        found = run_on_ranks(2, split, str(work), case.task, timeout=TIMEOUT)
    except RanksFailed as error:
        lines = [line for line in str(error).splitlines() if "Error" in line] or [str(error).splitlines()[0]]
        row.result.verdict, row.result.text = "wrong", f"[two ranks] {lines[-1].strip()[:300]}"
        return
    row.share = max(facts["kept"] for facts in found) / found[0]["whole"]
    row.far = max((facts["far"] for facts in found if facts["far"] is not None), default=None)
    if any(facts["kept"] != facts["half"] for facts in found):
        row.result.verdict, row.result.text = "wrong", f"[two ranks] not every tensor is split: {found[0]}"
    elif row.far is not None and not row.far <= FAR:
        row.result.verdict, row.result.text = "wrong", f"[two ranks] logits are off by {row.far:.2g} of the largest"


def split(folder: str, task: str) -> dict[str, Any]:
    """One of two ranks: bytes of its shard, and the distance of the logits."""
    import torch

    import dist_subspace as dsub
    from dist_subspace.errors import UsageError
    from dist_subspace.placement.collectives import world
    from dist_subspace.placement.tensors import resident_bytes
    from tests.families import reference
    from tests.matrix import tiny

    work = Path(folder)
    config = tiny.ds_config(3, trainable_numel=1, world_size=world().size)
    model = dsub.load_frozen(work / "model", SPLIT, dtype="float32", deepspeed=config, task=task)
    held = dict(model.named_parameters())
    facts: dict[str, Any] = {"kept": resident_bytes(list(held.values())), "whole": tiny.whole_bytes(held)}
    facts |= {"half": tiny.shard_bytes(held, world().size), "far": None}
    with suppress(UsageError):  # a method that finds no layer
        dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=1))  # which changes nothing yet
        engine = tiny.make_engine(model, config)
        with torch.no_grad():
            logits, _ = reference.run(engine.module.eval(), torch.load(work / "given.pt"))
        facts["far"] = reference.relative(logits, torch.load(work / f"{SPLIT}.pt"))
        engine.destroy()
    return facts


def shortened(sentence: str) -> str:
    return sentence if len(sentence) <= 200 else f"{sentence[:197]}..."


def summary(rows: list[Row]) -> Iterator[str]:
    verdicts = [row.result.verdict for row in rows]
    counts = {verdict: verdicts.count(verdict) for verdict in ("right", "refused", "wrong", "unmade")}
    yield (
        f"{len(rows)} families: {counts['right']} right, {counts['refused']} refused with one sentence, {counts['wrong']} wrong; "
        f"{counts['unmade']} that transformers itself cannot make or run do not count"
    )
    split_rows = [row for row in rows if row.share is not None]
    yield f"{len(split_rows)} of them loaded by two ranks, {sum(row.far is not None for row in rows)} run by them"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"
