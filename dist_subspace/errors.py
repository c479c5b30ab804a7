"""The one exception that means "the user can mend this": shown as a single sentence, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input or an impossible combination, refused early.

    The message is one sentence that names the field, the value and what is accepted. In Python it is a
    `ValueError`; the command line prints it from rank 0 without a traceback and exits with status 2.
    """


class Notice(UserWarning):
    """Something worth reading about what was just done; the result stands. The command line shows its sentence alone."""


def unknown_name(field: str, value: object, accepted: Iterable[str]) -> UsageError:
    """The error for a name that is not in a closed list; names the nearest one where there is one."""
    names = list(accepted)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UsageError(f"{field} is {value!r}{hint}; accepted: {', '.join(names)}")
