"""A repository on the Hub that is written to: one commit for everything, and one sentence for whatever goes wrong. Local.

A commit appears whole or not at all, so nobody downloads half an adapter. Large files are uploaded before it, by their hashes: a
push that was broken off is taken up where it was, as the Hub asks for no file that it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dist_subspace.errors import UsageError
from dist_subspace.loading.hub import ANSWER, Fault, bars_on_terminals, endpoint, fault_of, first_line, has_token, tried

T = TypeVar("T")
_TOKENS = "https://huggingface.co/settings/tokens"


@contextmanager
def _quiet() -> Iterator[None]:
    """What the Hub would like in a card is shown on its page, and a push without news is no fault."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class Repository:
    """field: what a refusal calls the name (`NAME`, `run.push_to_hub`). private: of a repository that is made new; None leaves it
    to its owner's account. revision: the branch that is written to."""

    name: str
    field: str = "NAME"
    revision: str | None = None
    private: bool | None = None

    def check(self) -> None:
        """What needs no Hub.

        Raises:
            UsageError: a name without an owner, or one that the Hub has no room for; nobody has logged in.
        """
        from huggingface_hub.utils import validate_repo_id

        try:
            if self.name.count("/") != 1:
                raise ValueError("it is no user/name")
            validate_repo_id(self.name)
        except ValueError as error:
            raise UsageError(
                f"{self.field} is {self.name!r} ({first_line(error)}); accepted: a name on the Hub, user/name"
            ) from error
        if not has_token():
            raise UsageError(
                f"{self.field} is {self.name!r}, and HF_TOKEN is not set; accepted: HF_TOKEN with a token that may write "
                f"({_TOKENS}), or `hf auth login` once"
            )

    def check_owner(self) -> None:
        """Whether the token is one of somebody who may write under this owner's name, as far as the Hub says.

        Raises:
            UsageError: it is not. Whatever the Hub does not answer raises what huggingface_hub raises.
        """
        from huggingface_hub import HfApi

        known = HfApi().whoami()
        names = [str(known.get("name")), *(str(group.get("name")) for group in known.get("orgs") or ())]
        owner = self.name.partition("/")[0]
        if owner not in names:
            raise UsageError(
                f"{self.field} is {self.name!r}, and the token is {names[0]}'s, who is not in {owner!r}; accepted: a name under "
                f"{', '.join(names)}"
            )

    def open(self) -> list[str]:
        """Make the repository and the branch where they are not there; returns the names of the files in it.

        Raises:
            UsageError: the Hub does not let this token, or it is public where a private one is asked for.
        """
        from huggingface_hub import HfApi

        def ask() -> list[str]:
            api = HfApi()
            api.create_repo(self.name, private=self.private, exist_ok=True)
            info = api.model_info(self.name, timeout=ANSWER)
            if self.private and info.private is False:
                raise UsageError(
                    f"{self.field} is {self.name!r}, which is public, and a private one is asked for; accepted: another name, or "
                    "its page on the Hub, which makes it private"
                )
            if self.revision is not None:
                api.create_branch(self.name, branch=self.revision, exist_ok=True)
                info = api.model_info(self.name, revision=self.revision, timeout=ANSWER)
            return [str(sibling.rfilename) for sibling in info.siblings or ()]

        return self._tried(ask)

    def card(self) -> str | None:
        """The README.md that is there; None where there is none."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        def ask() -> str | None:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(self.name, "README.md", revision=self.revision)).read_text(encoding="utf-8")
            return None

        return self._tried(ask)

    def license_of(self, base: str) -> dict[str, Any]:
        """What another repository's card says of its license; empty where it is not told."""
        from huggingface_hub import HfApi

        try:
            data = HfApi().model_info(base, timeout=ANSWER).card_data
        except Exception:  # a card without a license is what there would be otherwise
            return {}
        return {} if data is None else dict(data.to_dict())

    def commit(self, files: Mapping[str, Path | bytes], deleted: Iterable[str], message: str) -> str:
        """Write everything in one commit; returns the address of what is there now. Files that are there already as they are, are
        not sent again.

        Raises:
            UsageError: the Hub did not take it, or not the card's head.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        def ask() -> str:
            added = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in files.items()
            ]
            operations: list[Any] = [*added, *(CommitOperationDelete(name) for name in deleted)]
            with bars_on_terminals(), _quiet():
                info = HfApi().create_commit(self.name, operations, commit_message=message, revision=self.revision)
            return str(info.commit_url)

        return self._tried(ask)

    def _tried(self, ask: Callable[[], T]) -> T:
        def refusal(fault: Fault, tries: str) -> UsageError:
            return UsageError(
                f"{self.field} is {self.name!r}, and {endpoint()} did not take it in {tries} ({fault.reason}); accepted: "
                f"{fault.accepted}"
            )

        return tried(ask, self._fault, refusal)

    def _fault(self, error: BaseException) -> Fault:
        """What stands behind an error of huggingface_hub, for who writes."""
        fault, owner = fault_of(error, self.name), self.name.partition("/")[0]
        if isinstance(error, ValueError) and "README.md" in str(error):
            said = "; ".join(line.lstrip("- ") for line in str(error).splitlines()[1:])
            return Fault(
                f"the head of README.md is not the Hub's: {said or error}", "a head that it takes, or no README.md"
            )
        if fault.status == 401:
            return Fault("HTTP 401: it does not know the token", f"HF_TOKEN with a token that may write ({_TOKENS})")
        if fault.status in (403, 404):
            return Fault(
                f"HTTP {fault.status}: the token may not write to {owner!r}",
                f"a name under an account or an organisation of yours, and a token that may write ({_TOKENS})",
            )
        if "HF_HUB_OFFLINE" in fault.reason:
            return replace(fault, reason="HF_HUB_OFFLINE is set", accepted="HF_HUB_OFFLINE=0")
        if fault.passes and fault.status is None:
            return replace(
                fault, accepted="a way to it from this host (HF_ENDPOINT, HTTPS_PROXY), and the same command again"
            )
        return fault
