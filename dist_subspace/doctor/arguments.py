"""The doctor's command line where the packages are missing that the others need to read theirs: it shall say so itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dist_subspace.doctor import PATIENCE
from dist_subspace.doctor.command import doctor
from dist_subspace.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The same as `dist-subspace doctor`; `arguments` are those behind the command's name."""
    parser = argparse.ArgumentParser("dist-subspace doctor")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--patience", type=float, default=PATIENCE)
    given = parser.parse_args(arguments)
    try:
        doctor(given.config, given.overrides, given.json, given.patience)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
