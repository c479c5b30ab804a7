"""A dry run does everything up to the first step, shows what would be trained, and leaves the run's folder as it was."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE
from dist_subspace.training import dry_run
from dist_subspace.training.run import train
from tests.keys.bench import Bench
from tests.keys.watch import watched


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("dry"))


def tried(config: dict[str, Any], expect: int = EXIT_OK) -> tuple[str, int]:
    """What a dry run says, and how often it trained."""
    with watched() as seen, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = train(config, dry=True)
    assert status == expect, out.getvalue()[-3000:]
    return out.getvalue(), sum(call.trains for call in seen.calls)


def files_in(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_settings_sizes_and_three_samples_are_shown_and_nothing_is_written(bench: Bench) -> None:
    config = bench.configuration({"training.global_batch_size": None, "training.max_steps": 3})
    said, trained = tried(config)
    assert trained == 0
    lines = said.splitlines()
    assert "dry run: everything up to the first step works; nothing was trained" in lines
    assert sum(line.startswith("-- sample ") for line in lines) == dry_run.SAMPLES == 3
    assert sum("[[" in line and line.endswith("</s>]]") for line in lines) == 3
    assert "    global_batch_size: 22" in lines, "what null came to"
    assert any(line.startswith("3 steps of 22 samples") and "peak memory so far" in line for line in lines)
    assert any(" q_proj " in line for line in lines)
    folder = Path(config["run"]["output_dir"])
    assert set(files_in(folder)) <= {".lock"}


def test_a_run_that_is_there_stays_as_it_is_and_goes_on_afterwards(bench: Bench) -> None:
    config = bench.configuration({"training.max_steps": 2})
    bench.go(config)
    folder = Path(config["run"]["output_dir"])
    before = files_in(folder)
    config["training"]["max_steps"] = 3
    said, _ = tried(config)
    assert "dry run: everything up to step 3 works; nothing was trained" in said.splitlines()
    assert files_in(folder) == before
    refused, _ = tried(config | {"training": config["training"] | {"optim": "adamw_8bit"}}, EXIT_USAGE)
    assert sum(line.startswith("error: ") for line in refused.splitlines()) == 1 and files_in(folder) == before
    assert [line["step"] for line in bench.go(config).steps] == [1, 2, 3]
