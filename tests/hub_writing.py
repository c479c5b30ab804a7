"""The half of the small Hub on this machine that is written to: repositories made, cards checked, large files taken by their
hashes, commits that are whole or not there. What `huggingface_hub` itself asks of the Hub when it uploads without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import yaml

if TYPE_CHECKING:
    from tests.hub_server import HubServer, Repository

Answer = tuple[int, dict[str, Any]]
LARGE = (".safetensors", ".png", ".model")  # what a new repository keeps as large files


class Writer:
    """users: the names that a token may write under, its owner's own first. stored: large files by hash, also those of no commit
    yet. messages: of the commits, in order."""

    def __init__(self, server: HubServer) -> None:
        self.server = server
        self.users: dict[str, tuple[str, ...]] = {"hf_mine": ("me", "my-lab")}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []

    def answer(self, verb: str, path: str, token: str, body: bytes) -> Answer | None:
        """None for what is no question of a writer."""
        parts = path.strip("/").split("/")
        if verb == "PUT" and parts[0] == "large":
            self.stored[parts[1]] = body
            return 200, {}
        if parts[:1] == ["large"]:  # asked whether it came
            known = self.stored.get(parts[1])
            return (200, {}) if known is not None and len(known) == json.loads(body)["size"] else (404, {})
        if parts == ["api", "whoami-v2"]:
            names = self.users.get(token)
            return (401, {}) if names is None else (200, _who(names))
        if parts == ["api", "validate-yaml"]:
            return checked(json.loads(body)["content"])
        if parts == ["api", "repos", "create"]:
            return self._create(token, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "models"] and len(parts) >= 6 and verb == "POST" and parts[4] in _CHANGES:
            return self._change(token, "/".join(parts[2:4]), parts[4], unquote("/".join(parts[5:])), body)
        return None

    def _may(self, token: str, owner: str) -> int:
        names = self.users.get(token)
        return 401 if names is None else 200 if owner in names else 403

    def _create(self, token: str, asked: dict[str, Any]) -> Answer:
        name = f"{asked['organization']}/{asked['name']}"
        status = self._may(token, str(asked["organization"]))
        if status != 200:
            return status, {"error": "no"}
        if name in self.server.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}
        made = self.server.new_repository(name)
        made.private = asked.get("visibility") == "private"
        return 200, {"url": f"{self.server.address}/{name}", "name": name}

    def _batch(self, asked: dict[str, Any]) -> Answer:
        found = []
        for each in asked["objects"]:
            href = f"{self.server.address}/large/{each['oid']}"
            actions = (
                {} if each["oid"] in self.stored else {"actions": {"upload": {"href": href}, "verify": {"href": href}}}
            )
            found.append({"oid": each["oid"], "size": each["size"], **actions})
        return 200, {"transfer": "basic", "objects": found}

    def _change(self, token: str, name: str, what: str, revision: str, body: bytes) -> Answer:
        repository = self.server.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        status = self._may(token, name.partition("/")[0])
        if status != 200:
            return status, {"error": "no"}
        if what == "branch":
            if repository.at(revision) is not None:
                return 409, {"error": "Reference already exists"}
            repository.revisions[revision] = self.server.copy_of(repository)
            return 201, {}
        at = repository.at(revision)
        if at is None:
            return 404, {"error": "no such revision"}
        if what == "preupload":
            return 200, {"files": [_upload_mode(each["path"], at) for each in json.loads(body)["files"]]}
        return self._commit(name, at, body)

    def _commit(self, name: str, at: Repository, body: bytes) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = dict(at.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return 400, {"error": f"no large file {value['oid']}"}
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return 404, {"error": "A file with this name doesn't exist"}
        self.messages.append(message)
        at.files, at.commit = files, hashlib.sha1(body + at.commit.encode(), usedforsecurity=False).hexdigest()
        return 200, {
            "success": True,
            "commitUrl": f"{self.server.address}/{name}/commit/{at.commit}",
            "commitOid": at.commit,
        }


_CHANGES = ("branch", "preupload", "commit")


def _who(names: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "user", "name": names[0], "orgs": [{"name": name} for name in names[1:]]}


def _upload_mode(path: str, at: Repository) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    known = at.files.get(path)
    return {
        "path": path,
        "uploadMode": mode,
        "shouldIgnore": False,
        **({} if known is None else {"oid": _oid(known, mode)}),
    }


def _oid(content: bytes, mode: str) -> str:
    """As git has it: of a large file its sha256, of another the blob's."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def checked(card: str) -> Answer:
    """The rules of the Hub's own check that a card of ours could break (hub-docs, modelcard.md)."""
    _, head, _ = card.split("---\n", 2)
    said = yaml.safe_load(head)
    wrong = []
    for key in ("base_model", "library_name", "pipeline_tag", "license", "base_model_relation", "model_name"):
        if key in said and not isinstance(said[key], str):
            wrong.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics"):
        if key in said and not (isinstance(said[key], list) and all(isinstance(each, str) for each in said[key])):
            wrong.append(f'"{key}" must be an array of strings')
    if str(said.get("base_model", "a/b")).count("/") > 1 or str(said.get("base_model", "a")).startswith((".", "/")):
        wrong.append('"base_model" with value "..." is not valid. Use a model id from https://hf.co/models.')
    if str(said.get("license", "mit")) != str(said.get("license", "mit")).lower():
        wrong.append('"license" must be one of [apache-2.0, mit, ...]')
    for each in said.get("model-index") or ():
        for result in each["results"]:
            if not (result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")):
                wrong.append('"model-index[0].results[0].dataset.type" is required')
            if any(metric.get("type") is None or metric.get("value") is None for metric in result["metrics"]):
                wrong.append('"model-index[0].results[0].metrics[0].type" is required')
    found: dict[str, Any] = {"errors": [{"message": text} for text in wrong], "warnings": []}
    return (400 if wrong else 200), found
