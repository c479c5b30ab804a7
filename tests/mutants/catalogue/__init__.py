"""All mutants: every module of this folder lists those of one area in `MUTANTS`."""

from __future__ import annotations

import importlib
import pkgutil

from tests.mutants.mutant import Mutant


def mutants() -> list[Mutant]:
    """Those of every area, in the order of the areas' names."""
    areas = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [mutant for area in areas for mutant in importlib.import_module(f"{__name__}.{area}").MUTANTS]
