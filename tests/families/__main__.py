"""The verdicts on all families: `python -m tests.families [names ...] [--workers 2] [--timeout 60] [--json FILE]`.

With `--table`, family by storage, one process and two ranks (table.py); variants of families are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from tests.families import table
from tests.families.cases import Case, chosen
from tests.families.runner import TIMEOUT, Result, run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases (task/model_type), tasks, or model types; none: all")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a case may take")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file")
    parser.add_argument("--notes", action="store_true", help="show what was noted about each case")
    parser.add_argument("--table", action="store_true", help="each family in several storages, and on two ranks")
    given = parser.parse_args(arguments)
    cases = chosen(given.names)
    if not cases:
        parser.error(f"no case is called {', '.join(given.names)}")
    if given.table:
        return show_table(cases if given.names else [case for case in cases if not case.changes], given.timeout)
    results = run(cases, given.workers, given.timeout, lambda result: show(result, given.notes))
    counts = Counter(result.verdict for result in results)
    print(
        f"\n{len(cases)} configurations: {counts['right']} right, {counts['refused']} refused with one sentence, "
        f"{counts['wrong']} wrong; {counts['unmade']} that transformers itself cannot make or run do not count"
    )
    if given.json:
        given.json.write_text(json.dumps([result.as_dict() for result in results], indent=1))
    return 1 if counts["wrong"] else 0


def show_table(cases: list[Case], timeout: float) -> int:
    print(table.HEAD, flush=True)
    rows = table.table(cases, timeout, lambda row: print(row, flush=True))
    print("", *table.summary(rows), sep="\n")
    return 1 if any(row.result.verdict == "wrong" for row in rows) else 0


def show(result: Result, notes: bool) -> None:
    print(f"{result.verdict:8} {result.seconds:5.1f}s  {result.name:50} {result.text}", flush=True)
    for note in result.notes if notes else ():
        print(f"{'':17}{note}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
