"""What is read from the Hugging Face Hub: asked for several times where it may yet come, and said in one sentence where not.

huggingface_hub 2.4 repeats single requests of a download, but neither the first question for a repository nor a whole download
that broke; and where it cannot ask, it takes an older copy without a word. Local: who asks is decided elsewhere (one process of
a node).
"""

from __future__ import annotations

import errno
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dist_subspace.errors import UsageError
from dist_subspace.loading.index import weight_files, weight_names
from dist_subspace.notices import say

T = TypeVar("T")

WEIGHTS = "*.safetensors"
# Of a model's files: those that transformers reads, among the weights those of `index.weight_names`.
MODEL_FILES = ("*.json", WEIGHTS, "*.model", "*.txt", "*.jinja", "*.py")
# Everything that a tokenizer of transformers may consist of.
TOKENIZER_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.vocab",
    "*.py",
)

_INSIDE = "*/*"  # whatever lies in a folder of a repository
WAITS = (1.0, 3.0, 9.0)  # seconds between tries; the hub may name a longer time
LONGEST_WAIT = 120.0  # seconds that the hub may ask for
ANSWER = 10.0  # seconds in which the hub answers a question
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # of HTTP's statuses
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
_CONNECTION = frozenset({"TransportError", "XetDownloadError", "ChunkedEncodingError"})  # httpx, hf_xet, requests


@dataclass(frozen=True)
class Fault:
    """Why the hub gave nothing. passes: whether it may give it the next time; wait: the seconds that it asks for, if it does;
    status: HTTP's, where it answered."""

    reason: str
    accepted: str
    passes: bool = False
    wait: float = 0.0
    status: int | None = None


def is_hub_name(path: str) -> bool:
    """Whether it may be a repository's name: a path, and a file of a tokenizer, are none."""
    is_path = path.startswith((".", "/", "~")) or path.endswith((".model", ".json")) or path.count("/") > 1
    return bool(path) and not is_path


def cached(name: str, files: tuple[str, ...] = MODEL_FILES, revision: str | None = None) -> Path | None:
    """The copy of a repository on this machine, whole as far as these files go; None where there is none. No hub is asked.

    Arguments:
        revision: branch, tag or commit; None: the main branch.
    """
    from huggingface_hub import snapshot_download

    small = [pattern for pattern in files if pattern != WEIGHTS]
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=small, ignore_patterns=[_INSIDE], local_files_only=True
            )
        )
        if WEIGHTS in files:
            weight_files(folder)
        if not all((folder / name).exists() for name in files if "*" not in name):
            return None
    except Exception:  # whatever the hub's library calls "not here", and an index whose files are not
        return None
    return folder


def fetch(name: str, field: str, files: tuple[str, ...] = MODEL_FILES, revision: str | None = None) -> Path:
    """The files of a repository as the hub has them now, in this machine's cache: what its folders hold (other formats, the
    makers' own) is left there, and weights that transformers would not read. Where the hub cannot be asked, a whole copy that is
    there already is taken, and said (`Notice`). A commit never changes: a whole copy of one is taken without a question.

    Arguments:
        field: the key of the configuration that names the repository.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        UsageError: names the host, the repository, how often it was tried, why it was not given, and what to do.
    """
    from huggingface_hub import HfApi, snapshot_download

    copy = cached(name, files, revision)
    if copy is not None and copy.name == revision:
        return copy

    def ask() -> Path:
        # No older copy answers it, as one does below.
        info = HfApi().model_info(name, revision=revision, timeout=ANSWER)
        listed = [str(sibling.rfilename) for sibling in info.siblings or ()]
        wanted = [file for file in listed if _is_small(file, files)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if WEIGHTS in files and (weights := weight_names(folder, listed)):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, *weights]))
        if folder.name != info.sha:
            raise ConnectionError(f"it changed from {info.sha} to {folder.name} while it was read")
        return folder

    try:
        with bars_on_terminals():
            return asked(ask, name, field, waits=WAITS if copy is None else WAITS[:1], revision=revision)
    except UsageError as error:
        if copy is None:
            raise
        of = "" if revision is None else f" at {revision}"
        say(f"the copy of {name}{of} in this machine's cache (commit {copy.name[:12]}) is taken: {error}")
        return copy


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Within the block the Hub's library draws its bars of progress on a terminal alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def _is_small(file: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file of a repository is wanted, and no weights: those at its top, and templates of conversations, which
    transformers looks for in a folder too."""
    if "/" in file and not file.startswith("additional_chat_templates/"):
        return False
    return any(fnmatch(file, pattern) for pattern in patterns if pattern != WEIGHTS)


def asked(
    ask: Callable[[], T],
    name: str,
    field: str,
    waits: tuple[float, ...] | None = None,
    revision: str | None = None,
) -> T:
    """What `ask` gives, at the latest after as many waits as there are.

    Raises:
        UsageError: as `fetch`.
    """

    what = f"{field} is {name!r}" if revision is None else f"{field} is {name!r} at model.revision {revision!r}"

    def refusal(fault: Fault, tries: str) -> UsageError:
        return UsageError(
            f"{what}, which is not here, and {endpoint()} did not give it to {socket.gethostname()} in "
            f"{tries} ({fault.reason}); accepted: {fault.accepted}"
        )

    return tried(ask, partial(fault_of, name=name), refusal, waits)


def tried(
    ask: Callable[[], T],
    fault_of: Callable[[BaseException], Fault],
    refusal: Callable[[Fault, str], UsageError],
    waits: tuple[float, ...] | None = None,
) -> T:
    """What `ask` gives, which is called again after each of the waits while its faults may pass.

    Arguments:
        refusal: of the last fault, and of how often it was tried, in words.

    Raises:
        UsageError: the refusal, or one of `ask`'s own.
    """
    pauses = [*(WAITS if waits is None else waits), None]
    for tries, pause in enumerate(pauses, start=1):
        try:
            return ask()
        except UsageError:
            raise
        except Exception as error:  # the hub's client raises whatever its network layer raises
            fault = fault_of(error)
            if not fault.passes or pause is None or fault.wait > LONGEST_WAIT:
                raise refusal(fault, f"{tries} {'try' if tries == 1 else 'tries'}") from error
        time.sleep(max(pause, fault.wait))
    raise AssertionError("the last try returns or raises")


def fault_of(error: BaseException, name: str) -> Fault:
    """What stands behind an error of huggingface_hub, transformers or datasets, which wrap each other's."""
    chain = list(_chain(error))
    if _is_offline() or any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        return Fault(
            "HF_HUB_OFFLINE is set, and the cache does not hold it", f"HF_HUB_OFFLINE=0, or {_beforehand(name)}"
        )
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            free = _free(_cache())
            return Fault(f"{cause.strerror}: {_cache()}{free}", "another HF_HOME, or space in this one")
        if type(cause).__name__ == "RevisionNotFoundError":
            return Fault("HTTP 404: it has no such revision", f"a branch, a tag or a whole commit of {name}")
        response = getattr(cause, "response", None)
        if response is not None and getattr(response, "status_code", 200) >= 400:
            status = int(response.status_code)
            return replace(_of_status(status, response.headers, first_line(cause), name), status=status)
    broken = [cause for cause in chain if _is_of_connection(cause)]
    if broken:
        reached = first_line(broken[-1])
        return Fault(
            reached, f"a way to it from this host (HF_ENDPOINT, HTTPS_PROXY), or {_beforehand(name)}", passes=True
        )
    return Fault(first_line(error), "a repository with the files of a model, a tokenizer or a data set")


def _of_status(status: int, headers: Any, said: str, name: str) -> Fault:
    if status in _PASSING:
        wait = str(headers.get("Retry-After", "0"))
        asked_for = float(wait) if wait.isdecimal() else 0.0
        limit = "the same command later, or HF_TOKEN set, with which the hub allows more requests"
        return Fault(f"HTTP {status}", limit if status == 429 else "the same command later", True, asked_for)
    if status in (401, 403):
        token = "refuses the token" if has_token() else "wants a token, and HF_TOKEN is not set"
        page = f"access granted to you on the page of {name}, and a token of yours in HF_TOKEN on every node"
        return Fault(f"HTTP {status}: it does not exist, or is private or gated, and the hub {token} here", page)
    if status == 404:
        return Fault("HTTP 404: there is no such repository or file", f"a name that {endpoint()} knows, or a folder")
    return Fault(f"HTTP {status}: {said}", "what the hub asks for")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from, hidden ones too."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_of_connection(cause: BaseException) -> bool:
    if isinstance(cause, ConnectionError | TimeoutError):
        return True
    return any(kind.__name__ in _CONNECTION for kind in type(cause).__mro__)


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _beforehand(name: str) -> str:
    return f"the files fetched into HF_HOME ({_cache().parent}) beforehand, as by `hf download {name}`, and HF_HUB_OFFLINE=1"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)  # datasets does not always say so


def endpoint() -> str:
    """The hub that is asked."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _free(folder: Path) -> str:
    """Of the nearest folder that is there."""
    for near in (folder, *folder.parents):
        if near.exists():
            return f" has {shutil.disk_usage(near).free / 2**30:.1f} GiB free"
    return ""


def has_token() -> bool:
    """Whether HF_TOKEN is set, or somebody has logged in."""
    from huggingface_hub import get_token

    return get_token() is not None
