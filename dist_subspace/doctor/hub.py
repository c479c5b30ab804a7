"""Whether the Hugging Face Hub is reached, and whether the configuration's model can be had from it. The token is never shown."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_subspace.doctor.findings import REFUSED, REMARK, Finding
from dist_subspace.doctor.ranks import Ranks, alike, picked

KIND = "hub"
TIMEOUT = 5.0  # seconds
TRUE = {"1", "ON", "YES", "TRUE"}


def cache_folder() -> Path:
    """Where the Hub's library keeps what it has fetched, by its documented variables; the library is not needed for it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def examine(model: str | None, revision: str | None = None) -> dict[str, Any]:
    """Arguments:
    model: `model.path` where it is a name of the Hub, else None.
    revision: `model.revision`.
    """
    found: dict[str, Any] = {"offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE, "answer": None}
    token = _token()
    found["token"] = token is not None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not found["offline"]:
        found["answer"] = _ask(f"{endpoint}/api/models?limit=1", None)
    if model is not None:
        found |= {"model": model, "revision": revision, "here": _is_here(model, revision), "access": None}
        if found["answer"] == 200:
            found["access"] = _ask(f"{endpoint}/api/models/{model}/auth-check", token)
        if found["access"] == 200 and revision is not None:
            found["has revision"] = _ask(f"{endpoint}/api/models/{model}/revision/{quote(revision, safe='')}", token)
    return found


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    yield "Hub", picked(found, _answer_text)
    yield "token", picked(found, lambda facts: "set" if facts["token"] else "none")
    if any("model" in facts for facts in found.values()):
        yield "model", picked(found, _model_text)


def judge(ranks: Ranks) -> Iterator[Finding]:
    for facts, places in alike(ranks.of(KIND)):
        here, where = facts.get("here", True), tuple(places)
        reached = facts["answer"] == 200
        if not here and not reached:
            why = "HF_HUB_OFFLINE is set" if facts["offline"] else f"the Hub is not reached ({facts['answer']})"
            yield Finding(
                KIND,
                "model",
                where,
                f"model.path is {facts['model']!r}, which is not in the Hub's cache, and {why}",
                "fetch it there (hf download NAME), point HF_HOME at a cache that has it, or let the node reach the Hub",
                REFUSED,
            )
        elif not here and facts["access"] != 200:
            yield Finding(KIND, "model", where, *_refused(facts), REFUSED)
        elif not here and facts.get("has revision", 200) != 200:
            what = (
                f"the Hub has no revision {facts['revision']!r} of {facts['model']!r} (status {facts['has revision']})"
            )
            yield Finding(
                KIND, "model", where, what, "correct model.revision: a branch, a tag or a whole commit", REFUSED
            )
        elif not reached and not facts["offline"]:
            yield Finding(
                KIND,
                "Hub",
                where,
                f"the Hub is not reached ({facts['answer']})",
                "set HF_HUB_OFFLINE=1 where that is so by design, so that no library waits for it",
                REMARK,
                breaks=False,
            )


def _refused(facts: dict[str, Any]) -> tuple[str, str]:
    """What is wrong with a model that the Hub does not give, and what to do."""
    name, answer = facts["model"], facts["access"]
    if answer == 404:
        return f"the Hub has no model {name!r}, or none that this token may see", "correct model.path, or set HF_TOKEN"
    if answer in (401, 403):
        token = "with the token that is set" if facts["token"] else "without a token"
        return (
            f"the Hub does not let {name!r} be read {token} (status {answer})",
            f"accept its terms at https://huggingface.co/{name}, and set HF_TOKEN on every node (launch/carried.sh hands it on)",
        )
    return (
        f"the Hub did not say whether {name!r} can be read ({answer})",
        "try again, or fetch it first (hf download NAME)",
    )


def _token() -> str | None:
    try:
        from huggingface_hub import get_token

        return get_token()
    except Exception:  # the library is missing or broken, which is said elsewhere
        return os.environ.get("HF_TOKEN")


def _is_here(model: str, revision: str | None) -> bool:
    """Whether the cache holds the model's weights, whole by their index."""
    from dist_subspace.loading.index import open_checkpoint
    from dist_subspace.loading.load import local_folder

    folder = local_folder(model, revision)
    if folder is None:
        return False
    try:
        open_checkpoint(folder)
    except ValueError:
        return False
    return True


def _ask(url: str, token: str | None) -> int | str:
    """The status of the answer, or in words why there was none."""
    request = urllib.request.Request(url, headers={"User-Agent": "dist-subspace doctor"})
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _answer_text(facts: dict[str, Any]) -> str:
    if facts["offline"]:
        return "offline, by HF_HUB_OFFLINE"
    return "reached" if facts["answer"] == 200 else f"not reached ({facts['answer']})"


def _model_text(facts: dict[str, Any]) -> str:
    if "model" not in facts:
        return ""
    if facts["here"]:
        return f"{facts['model']}: in the cache"
    return f"{facts['model']}: {'can be read' if facts['access'] == 200 else 'not here'}"
