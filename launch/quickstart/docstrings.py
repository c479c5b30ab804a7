"""Real text that is on every machine, and a task made of it: which module of the standard library is a docstring from?"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = 12  # how many modules the task has to tell apart
PER_MODULE = 140  # at most so many docstrings of one module: no module's name is a good guess
DOCUMENT_SHOWN = 220  # characters of a docstring in a prompt
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


@dataclass(frozen=True)
class Docstring:
    module: str
    signature: str
    text: str


def docstrings() -> list[Docstring]:
    """Every distinct docstring of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if SKIPPED.isdisjoint(place.parts):
            for each in docstrings_of(file, place.with_suffix("").parts[0]):
                found.setdefault(" ".join(each.text.split()), each)
    return list(found.values())


def docstrings_of(file: Path, module: str) -> Iterator[Docstring]:
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > 20:
                yield Docstring(module, signature_of(node), text)


def signature_of(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {node.name}({ast.unparse(node.args)})"
    return f"class {node.name}" if isinstance(node, ast.ClassDef) else ""


def question(each: Docstring) -> str:
    return f"{each.signature}\n{' '.join(each.text.split())[:DOCUMENT_SHOWN]}\nThis is from the module"


def task_rows(texts: list[Docstring]) -> list[dict[str, str]]:
    """prompt and completion for the docstrings of the modules that have most of them, shuffled."""
    public = [each for each in texts if not each.module.startswith("_")]
    modules = [name for name, _ in Counter(each.module for each in public).most_common(MODULES)]
    order = random.Random(0)
    order.shuffle(public)
    rows = []
    for module in modules:
        chosen = [each for each in public if each.module == module][:PER_MODULE]
        rows += [{"prompt": question(each), "completion": f" {module}"} for each in chosen]
    order.shuffle(rows)
    return rows
