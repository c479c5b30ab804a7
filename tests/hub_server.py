"""A small Hugging Face Hub on this machine: repositories from folders, or written to, and faults on demand. `huggingface_hub`
itself asks it, in a process whose HF_ENDPOINT names it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from tests.hub_writing import Writer

CUT = -1  # a status: the connection is closed in the middle of the answer


@dataclass
class Repository:
    """commit: what `main` is. revisions: what else there is, by branch or tag. faults: the statuses of the next answers, first to
    last, to questions whose path holds `where`."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    revisions: dict[str, Repository] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)
    where: str = ""
    always: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def at(self, revision: str) -> Repository | None:
        """What a branch, a tag or a commit is."""
        everything = {"main": self, self.commit: self, **{other.commit: other for other in self.revisions.values()}}
        return (everything | self.revisions).get(revision)


class HubServer(ThreadingHTTPServer):
    """repositories: by name. requests: (method, path, name of the asking process), in order. writer: who takes what is pushed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()
        self.writer = Writer(self)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Of a process that asks this hub, and no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN_PATH": str(home / "none"),
        }
        return kept | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | more

    def add(self, name: str, folder: Path, **how: object) -> Repository:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(files, **how)  # type: ignore[arg-type]
        return self.repositories[name]

    def new_repository(self, name: str) -> Repository:
        """As the Hub makes one."""
        self.repositories[name] = Repository({".gitattributes": b"*.safetensors filter=lfs"})
        return self.repositories[name]

    @staticmethod
    def copy_of(repository: Repository) -> Repository:
        return Repository(dict(repository.files), commit=repository.commit[::-1])

    def asked(self, method: str, part: str) -> list[str]:
        """The paths of the requests that hold this part."""
        return [path for verb, path, _ in self.requests if verb == method and part in path]


@contextmanager
def asked_from_here(address: str, home: Path, token: str | None = None) -> Iterator[None]:
    """Within the block this process asks the hub at the address, which need not be there, with a cache of its own."""
    own = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "none"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setattr(constants, name, value)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        close_session()
        yield
    close_session()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    wanted: list[str]

    def do_GET(self) -> None:
        if not self._wrote(b""):
            self._answer(with_body=True)

    def do_PUT(self) -> None:
        self._wrote(self._body())

    def do_POST(self) -> None:
        """What is known of some paths."""
        body = self._body()
        if self._wrote(body):
            return
        asked = body.decode()
        self.wanted = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked).get("paths", [])
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _wrote(self, body: bytes) -> bool:
        """Whether it was a writer's question, which is answered then."""
        path, token = urlsplit(self.path).path, self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.server.repositories.get("/".join(path.split("/")[3:5]))
        if path.endswith("/info/lfs/objects/batch"):
            repository = self.server.repositories.get(path.strip("/").removesuffix(".git/info/lfs/objects/batch"))
        fault = 200
        if self.command != "GET" and repository is not None and repository.where and repository.where in path:
            fault = self._fault(repository, path)
        with self.server.lock:
            answer = self.server.writer.answer(self.command, path, token, body) if fault == 200 else (fault, {})
            if answer is not None:
                self.server.requests.append((self.command, unquote(path), self.headers.get("User-Agent", "")))
        if answer is not None:
            self._send(answer[0], json.dumps(answer[1]).encode(), {}, with_body=True)
        return answer is not None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path, self.headers.get("User-Agent", "")))
        parts = path.strip("/").removeprefix("datasets/").split("/")
        is_question = parts[0] == "api"
        name, rest = ("/".join(parts[2:4]), parts[4:]) if is_question else ("/".join(parts[:2]), parts[2:])
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        status = self._fault(repository, path)
        if status == CUT and not with_body:
            status = 200
        if status not in (200, CUT):
            code = {"X-Error-Code": "GatedRepo"} if status in (401, 403) else {}
            return self._send(status, b"{}", repository.headers | code, with_body)
        # api/.../revision/REVISION, api/.../tree/REVISION, .../resolve/REVISION/FILE
        at = repository.at(rest[1]) if rest[:1] in (["revision"], ["tree"], ["resolve"]) else repository
        if at is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        repository = at
        if is_question:
            return self._send(status, json.dumps(self._facts(name, repository, rest)).encode(), {}, with_body)
        file = repository.files.get("/".join(rest[2:]))  # after resolve/REVISION
        if file is None:
            return self._send(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}, with_body
            )
        known = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        return self._send(206 if start and status == 200 else status, file[start:], known, with_body)

    def _fault(self, repository: Repository, path: str) -> int:
        if repository.where not in path:
            return 200
        with self.server.lock:
            return repository.faults.pop(0) if repository.faults else repository.always

    def _facts(self, name: str, repository: Repository, rest: list[str]) -> object:
        listed = [
            {"type": "file", "path": path, "rfilename": path, "size": len(content), "oid": _oid(content)}
            for path, content in sorted(repository.files.items())
        ]
        return (
            listed
            if rest[:1] == ["tree"]
            else {"id": name, "sha": repository.commit, "siblings": listed, "tags": [], "private": repository.private}
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200 if status == CUT else status)
        for key, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if status == CUT else body)
        if status == CUT:
            self.close_connection = True


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
