"""Which paths are names on the Hub, and what a repository without an adapter comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.interchange.hub_adapter import adapter_for_ranks, adapter_here, names_repository
from tests.hub_server import HubServer, asked_from_here, hub_server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def test_a_folder_that_is_here_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert names_repository("me/mine")
    for path in ("runs/mine", "adapter", "./me/mine", "/me/mine", "a/b/c", str(tmp_path)):
        assert not names_repository(path) and adapter_here(path, "PATH") == Path(path) == adapter_for_ranks(path)


def test_a_repository_is_fetched_and_one_without_an_adapter_is_said(hub: HubServer, tmp_path: Path) -> None:
    for name, files in (
        ("me/adapter", ("adapter_config.json", "adapter_model.safetensors")),
        ("me/other", ("config.json",)),
    ):
        (tmp_path / name).mkdir(parents=True)
        for file in (*files, "README.md"):
            (tmp_path / name / file).write_text("{}")
        hub.add(name, tmp_path / name)
    with asked_from_here(hub.address, tmp_path / "cache"):
        for fetch in (lambda name: adapter_here(name, "PATH"), lambda name: adapter_for_ranks(name, "PATH")):
            folder = fetch("me/adapter")
            assert sorted(file.name for file in folder.iterdir()) == [
                "adapter_config.json",
                "adapter_model.safetensors",
            ]
            with pytest.raises(
                UsageError, match="PATH is 'me/other', a repository without an adapter; accepted: one with"
            ):
                fetch("me/other")
    own = tmp_path / "torn" / "hub" / "models--me--adapter"
    (own / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (own / "snapshots" / ("a" * 40) / "adapter_config.json").write_text(
        "{}"
    )  # what reads a configuration alone has left
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text("a" * 40)
    with asked_from_here(hub.address, tmp_path / "torn"):
        hub.repositories["me/adapter"].always, hub.repositories["me/adapter"].where = 404, ""
        with pytest.raises(UsageError, match=r"PATH is 'me/adapter', which is not here, and .*HTTP 404"):
            adapter_here("me/adapter", "PATH")
