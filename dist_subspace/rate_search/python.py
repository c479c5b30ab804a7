"""In a script or a notebook: `find_learning_rate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE

if TYPE_CHECKING:
    from dist_subspace.rate_search.results import FoundRate


def find_learning_rate(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    rates: Sequence[float] | None = None,
    steps: int | None = None,
    eval_samples: int = 512,
    output: str | Path | None = None,
) -> FoundRate:
    """The best learning rate of short runs, as `dist-subspace find-lr` finds it: `find_learning_rate("my.yaml").rate`.

    Under a launcher every rank calls it, and gets the same.

    Arguments:
        config: the path of a YAML file, or the sections as a mapping.
        overrides: changes to it, such as "model.storage=nf4".
        rates: that are tried; unset: seven around the method's own, and more where the best lies at an end.
        steps: of the rates that get furthest; unset: 80, at most the run's own.
        eval_samples: held-out samples of a comparison, drawn by the seed.
        output: a folder for figures and picture; unset: beside the run's own, with `-find-lr` behind its name.

    Returns:
        The result: `rate`, `line` to paste, and every rate that was `tried`.

    Raises:
        UsageError: the search is refused. RuntimeError: it failed, was interrupted, or no rate lowers the held-out loss.
    """
    from dist_subspace.rate_search.asked import Asked
    from dist_subspace.rate_search.command import Told, find_lr  # the loop, which whoever reads the name does not need

    source = config if isinstance(config, str | Path) else dict(config)
    told = Told()
    asked = Asked(source, overrides, rates=rates, steps=steps, output=output, eval_samples=eval_samples)
    status = find_lr(asked, told)
    if status == EXIT_OK and told.found is not None:
        return told.found
    message = told.message or f"find-lr ended with status {status}"
    raise UsageError(message) if status == EXIT_USAGE else RuntimeError(message)
