"""The Hub as a server here: reached, not reached, a model that the token opens or not; the token is never shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.doctor.hub import cache_folder, examine, judge, rows
from tests.doctor.facts import ranks_of, sentences
from tests.ranks import free_port

TOKEN = "hf_secret"
NAME = "someone/gated"


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        gated = "auth-check" in self.path
        right = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        unknown = gated and NAME not in self.path
        self.send_response(404 if unknown else 200 if right or not gated else 401)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield address
    server.shutdown()


def said(facts: dict[str, Any], breaks: bool = True) -> list[str]:
    ranks = ranks_of("hub", [facts])
    shown = json.dumps(facts) + str(list(rows(ranks))) + str(list(judge(ranks)))
    assert TOKEN not in shown
    return sentences(ranks, judge(ranks), breaks)


def test_a_gated_model_is_asked_for_with_the_token(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(examine(NAME)) == []
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert said(examine(NAME)) == [
        f"node1: the Hub does not let '{NAME}' be read with the token that is set (status 401)"
    ]
    assert said(examine("someone/unknown"))[0].startswith("node1: the Hub has no model 'someone/unknown'")


def test_a_hub_that_is_not_reached_matters_where_a_model_must_come_from_it(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    alone, wanted = examine(None), examine(NAME)
    assert said(alone) == [] and said(alone, breaks=False) == [
        "node1: the Hub is not reached ([Errno 111] Connection refused)"
    ]
    assert said(wanted)[0].startswith(
        f"node1: model.path is '{NAME}', which is not in the Hub's cache, and the Hub is not reached"
    )


def test_offline_by_design_is_no_remark(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said(examine(None)) == said(examine(None), breaks=False) == []
    assert said(examine(NAME))[0].endswith("which is not in the Hub's cache, and HF_HUB_OFFLINE is set")


def test_the_cache_is_where_the_hubs_library_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert cache_folder() == Path("/data/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/data/cache")
    assert cache_folder() == Path("/data/cache")
