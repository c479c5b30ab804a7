"""These tests run in a process of their own, all together: registering the pretended device is for the rest of a process, and
torch must not have made a backward before it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, forked

INSIDE = "DIST_SUBSPACE_PRETENDED"  # set in that process
SECONDS = 600
HERE = Path(__file__).parent
_REPORTS: dict[str, list[pytest.TestReport]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE in os.environ or HERE not in item.path.parents:
        return None
    if item.nodeid not in _REPORTS:
        _REPORTS.update(_run_apart([i.nodeid for i in item.session.items if HERE in i.path.parents], item.config))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _REPORTS[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_apart(names: list[str], config: pytest.Config) -> dict[str, list[pytest.TestReport]]:
    """The tests' reports from one process that runs them all; a test that it did not come to has failed."""
    found: dict[str, list[pytest.TestReport]] = {}
    with tempfile.TemporaryDirectory(prefix="pretended-") as folder:
        process = forked(_pytest, names, folder)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
        lines = Path(folder, "reports")
        for line in lines.read_text().splitlines() if lines.exists() else ():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            found.setdefault(report.nodeid, []).append(report)
        output = Path(folder, "output").read_text(errors="replace") if Path(folder, "output").exists() else ""
    for name in names:
        if not any(report.when == "teardown" for report in found.get(name, ())):
            text = (
                f"the process of these tests ended before this one (exit status {process.exitcode})\n{output[-3000:]}"
            )
            found[name] = [pytest.TestReport(name, ("", None, ""), {}, "failed", text, "call")]
    return found


def _pytest(names: list[str], folder: str) -> None:
    os.environ[INSIDE] = "1"
    os.chdir(ROOT)
    file = os.open(os.path.join(folder, "output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = pytest.main([*names, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[_Recorder(folder)])
    sys.exit(int(status))


class _Recorder:
    def __init__(self, folder: str) -> None:
        self.path = Path(folder, "reports")

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data: Any = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.path.open("a") as file:
            file.write(json.dumps(data) + "\n")
