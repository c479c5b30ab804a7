"""What is checked before a run that pushes, and what a Hub that fails costs at its end: a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.loading import hub as loading_hub
from dist_subspace.publishing.at_the_end import check_before, push_at_the_end, result_repository
from tests.hub_server import HubServer, asked_from_here, hub_server

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def test_a_run_that_could_not_push_is_refused_before_it_begins(hub: HubServer, tmp_path: Path) -> None:
    mine, yours = result_repository("me/mine", None), result_repository("you/yours", None)
    with (
        asked_from_here(hub.address, tmp_path),
        pytest.raises(UsageError, match=r"run\.push_to_hub .* HF_TOKEN is not set"),
    ):
        check_before(mine, pytest.fail)
    with asked_from_here(hub.address, tmp_path, "hf_mine"):
        check_before(mine, pytest.fail)
        with pytest.raises(
            UsageError, match="the token is me's, who is not in 'you'; accepted: a name under me, my-lab"
        ):
            check_before(yours, pytest.fail)
        assert not hub.repositories, "nothing is made before there is something to push"
        hub.new_repository("me/public")
        hub.new_repository("me/whole").files["model.safetensors"] = b""
        check_before(result_repository("me/public", None), pytest.fail)
        with pytest.raises(UsageError, match="which is public, and a private one is asked for"):
            check_before(result_repository("me/public", True), pytest.fail)
        with pytest.raises(UsageError, match="which holds a whole model, and this is an adapter"):
            check_before(result_repository("me/whole", None), pytest.fail)


def test_a_hub_that_is_down_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_hub, "WAITS", (0.01,))
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "config.json").write_text("{}")
    (tmp_path / "run" / "adapter" / "model.safetensors").write_bytes(b"")
    said: list[str] = []
    with asked_from_here(NOWHERE, tmp_path, "hf_mine"):
        check_before(result_repository("me/mine", True), said.append)
        push_at_the_end(tmp_path / "run" / "adapter", result_repository("me/mine", True), said.append)
    assert len(said) == 2 and said[0].startswith(
        "run.push_to_hub: the Hub does not say now whether it will take me/mine ("
    )
    assert said[1].startswith(
        "warning: the adapter was not pushed (run.push_to_hub is 'me/mine', and http://127.0.0.1:9 did "
    )
    assert said[1].endswith(f"`dist-subspace push {tmp_path / 'run'} me/mine --private` does it")
