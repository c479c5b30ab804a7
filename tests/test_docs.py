"""The documents keep up with the tree: what they name is there, what the tree has they name, and citations meet a heading."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import docs_tables

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
SOURCES = sorted(path for folder in ("dist_subspace", "tests", "launch") for path in (ROOT / folder).rglob("*.py"))

# In code and tests: docs/methods.md, "Signs"; the heading may go on in the next line of a comment.
CITATION = re.compile(r'docs/(\w+\.md)(?:, "([^"]+)")?')
UNPLACED = re.compile(r"(?<![\w/])(?:methods|pains|design|failures|style|cluster)\.md")
NAMED_TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")
NAMED_FILE = re.compile(r"(?<![\w/.])((?:dist_subspace|tests|launch|configs)/[\w./-]*\w/?|\.ci/run|\.github/[\w./]+)")
EXAMPLES = ("test_docs.py", "docs_tables.py")  # which speak of citations
# Shown in docs/extending.md.
WORKED = (
    *("subspace/extension/moslora.py", "subspace/extension/miss.py", "storage/fp8.py"),
    *("placement/whole/parameters.py", "placement/whole/engine.py"),
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@functools.cache
def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(page: Path, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", prose(page), flags=re.DOTALL | re.MULTILINE)
    return "" if found is None else found[1]


@functools.cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def citations(path: Path) -> list[tuple[str, str]]:
    """(page, heading or "") of every citation in a file of Python."""
    text = re.sub(r"\s*\n\s*(?:# ?)?", " ", path.read_text(encoding="utf-8"))
    return [(page, heading) for page, heading in CITATION.findall(text) if path.name not in EXAMPLES]


def test_a_citation_in_code_or_tests_names_a_page_and_a_heading_that_are_there() -> None:
    known = {page.name: headings(page) for page in DOCS}
    cited = [(path, *found) for path in SOURCES for found in citations(path)]
    assert len(cited) > 25, "citations are found"
    wrong = [
        f"{path.relative_to(ROOT)}: docs/{page}, {heading!r}"
        for path, page, heading in cited
        if page not in known or (heading and heading not in known[page])
    ]
    assert wrong == []


def test_no_citation_is_without_its_folder() -> None:
    """A chapter's number, or a page by its bare name, leads a reader nowhere."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if path.name not in EXAMPLES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNPLACED.search(line)
    ]
    assert wrong == []


@pytest.mark.parametrize("page", [p for p in DOCS if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_a_heading_is_given_once(page: Path) -> None:
    assert [h for h, times in Counter(map(anchor, headings(page))).items() if times > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    wrong = [
        f"{path}::{name}"
        for path, name in NAMED_TEST.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).is_file() or (name and name not in functions(path))
    ]
    assert wrong == []


def test_no_test_is_named_by_the_number_of_a_promise() -> None:
    """Its name is the promise."""
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests") and path.name not in EXAMPLES]
    numbered = {path.name: re.findall(r"test_rows?_\d\w*", path.read_text(encoding="utf-8")) for path in tests}
    assert {name: found for name, found in numbered.items() if found} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = {path.rstrip(".") for path in NAMED_FILE.findall(prose(page))}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    short = set(re.findall(r"`([\w/]+\.py)`", prose(page)))
    assert [end for end in sorted(short) if not any(path.as_posix().endswith(f"/{end}") for path in SOURCES)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, place = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (place and place not in map(anchor, headings(there))):
            wrong.append(target)
    assert wrong == []


def test_every_failure_says_what_happens_elsewhere_what_happens_here_and_what_guards_it() -> None:
    page = ROOT / "docs" / "failures.md"
    entries = re.findall(r"^## (.+)$", prose(page), flags=re.MULTILINE)
    assert len(entries) > 40
    parts = [(entry, re.findall(r"\*(Elsewhere|Here|Guard):\*", section(page, entry))) for entry in entries]
    assert [entry for entry, found in parts if found != ["Elsewhere", "Here", "Guard"]] == []


def test_the_worked_examples_are_the_code_of_the_tree() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = {
        line
        for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    }
    code = "\n".join((ROOT / "dist_subspace" / path).read_text(encoding="utf-8") for path in WORKED).splitlines()
    assert len(shown) > 40
    assert sorted(shown - {*code, "    ..."}) == []


def test_every_method_has_a_section_with_its_reference_its_count_and_its_options() -> None:
    from dist_subspace import methods
    from dist_subspace.subspace.core.constraints import constraint_options

    page = ROOT / "docs" / "methods.md"
    for name, info in methods().items():
        text = " ".join(section(page, name).split())
        assert text, f"docs/methods.md has no section {name!r}"
        own = info.options.keys() - constraint_options(info.constraints).keys()
        wanted = [f"arXiv {info.reference}", f"*Count:* `{info.count}`", *(f"`{option}`" for option in sorted(own))]
        assert [what for what in wanted if what not in text] == [], name


def test_every_golden_number_of_the_methods_is_one_that_a_test_holds() -> None:
    golden = re.compile(r"(?<![\d.])\d+\.\d{6,}")
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests" / "subspace")]
    held = {float(number) for path in tests for number in golden.findall(path.read_text(encoding="utf-8"))}
    shown = golden.findall(prose(ROOT / "docs" / "methods.md"))
    assert len(shown) > 80
    assert [number for number in shown if float(number) not in held] == []


@pytest.mark.parametrize("name", docs_tables.TABLES)
def test_a_generated_table_is_that_of_the_registry(name: str) -> None:
    """Every method, option, storage, preset, key and recipe: `python -m tests.docs_tables` writes them."""
    shown = docs_tables.shown(docs_tables.page_of(name).read_text(encoding="utf-8"))
    assert shown[name] == docs_tables.TABLES[name](), "run `python -m tests.docs_tables`"


def test_every_configuration_section_storage_and_preset_is_spoken_of() -> None:
    from dist_subspace.config.schema import Config
    from dist_subspace.placement.deepspeed.presets import PRESETS
    from dist_subspace.storage import storages

    sections = section(ROOT / "docs" / "design.md", "Configuration sections")
    assert [name for name in Config.model_fields if f"`{name}`" not in sections] == []
    text = prose(ROOT / "docs" / "reference.md")
    assert [name for name in (*storages(), *PRESETS) if f"| `{name}` |" not in text] == []
