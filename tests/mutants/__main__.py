"""Run the mutants: python -m tests.mutants [--only PATTERN ...] [--workers N] [--seen-green] [--json FILE]."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections import Counter
from pathlib import Path

from tests.mutants.catalogue import mutants
from tests.mutants.runner import Outcome, outcomes, red_without_any

ENOUGH = 0.95  # of all, caught


def main() -> int:
    arguments = _arguments()
    chosen = [m for m in mutants() if any(fnmatch.fnmatch(m.name, pattern) for pattern in arguments.only)]
    if not chosen:
        print(f"no mutant is called {' or '.join(arguments.only)}", file=sys.stderr)
        return 2
    start = time.monotonic()
    red: list[str]
    red, told = ([], "") if arguments.seen_green else red_without_any(chosen, arguments.workers)
    done = [Outcome(m, "unfit", 0.0, "its test is red without it") for m in chosen if set(m.tests) & set(red)]
    if red:
        print(told, "\nRed without any mutant:", *red, sep="\n  ", file=sys.stderr)
    for outcome in outcomes([m for m in chosen if not set(m.tests) & set(red)], arguments.workers):
        done.append(outcome)
        print(f"{outcome.verdict:6}  {outcome.seconds:5.0f} s  {outcome.mutant.name}", flush=True)
        if outcome.verdict != "caught":
            print(f"        {outcome.mutant.promise}\n{outcome.output[-4000:]}", flush=True)
    if arguments.json:
        _write(done, arguments.json)
    return _closing(done, time.monotonic() - start)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="names, with * and ?")
    parser.add_argument("--workers", type=int, default=2, help="mutants tried side by side")
    parser.add_argument(
        "--seen-green", action="store_true", help="the suite is green on this tree: do not try it again"
    )
    parser.add_argument("--json", type=Path, help="where the outcomes are written")
    return parser.parse_args()


def _write(done: list[Outcome], path: Path) -> None:
    rows = [{"name": o.mutant.name, "verdict": o.verdict, "seconds": round(o.seconds, 1)} for o in done]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _closing(done: list[Outcome], seconds: float) -> int:
    counts = Counter(outcome.verdict for outcome in done)
    others = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("missed", "hung", "unfit"))
    print(f"{len(done)} mutants: {counts['caught']} caught, {others}; {seconds:.0f} s")
    for outcome in done:
        if outcome.verdict != "caught":
            print(f"  {outcome.verdict}: {outcome.mutant.name} ({outcome.mutant.file})")
    return 0 if counts["caught"] >= ENOUGH * len(done) else 1


if __name__ == "__main__":
    sys.exit(main())
