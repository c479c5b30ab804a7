"""What a run will write, in bytes, computed from its configuration and the shapes of its model; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_subspace.doctor.sizes import size

OF_ADAPTER = 4  # bytes of a trained number in the adapter's file
OF_OPTIMIZER = 12  # float32 master and two moments
OF_TOKEN = 5  # bytes of a token on disk: its id, and whether it is trained
BYTES_A_TOKEN = 3  # of text; fewer than in any language that tokenizers are made for


def needs(config: Any, folder: Path) -> dict[str, int | None]:
    """Bytes of one checkpoint, the final adapter, factors, tokens, and of all in the run's folder at its fullest; None for what
    the configuration leaves open.

    Arguments:
        folder: the model's, of which config.json alone is read.
    """
    trained, kept, factors = _sizes(config, folder)
    checkpoint = (OF_ADAPTER + OF_OPTIMIZER) * trained + 4 * kept
    adapter = OF_ADAPTER * trained + 4 * kept
    tokens = OF_TOKEN * sum(_bytes(path) for path in data_files(config)) // BYTES_A_TOKEN
    count = checkpoints_at_once(config)
    whole = None if count is None else count * checkpoint + adapter + 4 * factors + tokens
    return {
        "checkpoint": checkpoint,
        "checkpoints": count,
        "adapter": adapter,
        "factors": 4 * factors,
        "tokens": tokens,
        "run": whole,
    }


def needs_text(found: dict[str, int | None]) -> str:
    """What `needs` has found, in words."""
    checkpoint, count = size(found["checkpoint"] or 0), found["checkpoints"]
    parts = f"adapter {size(found['adapter'] or 0)}, factors {size(found['factors'] or 0)}, tokens {size(found['tokens'] or 0)}"
    if found["run"] is None:
        return f"a checkpoint of {checkpoint} every so many steps, of which all are kept; {parts}"
    return f"up to {size(found['run'])}: {count} checkpoint{'' if count == 1 else 's'} of {checkpoint}, {parts}"


def checkpoints_at_once(config: Any) -> int | None:
    """The most checkpoints that lie in the run's folder at one moment: those that are kept, the best one, and the one that is
    being written; None for a run that keeps all and whose length in steps follows from its data."""
    section, steps = config.checkpoint, config.training.max_steps
    all_of_run = None if steps is None else math.ceil(steps / section.save_steps)
    if section.save_total_limit is None:
        return all_of_run
    kept = section.save_total_limit + (section.metric_for_best_model is not None) + 1
    return kept if all_of_run is None else min(kept, all_of_run)


def data_files(config: Any) -> list[str]:
    """The paths of `data.train` and `data.eval` that name files, and no data set of the Hub."""
    from dist_subspace.training.data.sources import HUB_NAME, READERS

    given = config.data.train
    named: list[object] = [given] if isinstance(given, str) else [source.path for source in given]
    texts = [path for path in [*named, config.data.eval] if isinstance(path, str)]
    return [path for path in texts if Path(path).suffix.lower() in READERS or not HUB_NAME.match(path)]


def _sizes(config: Any, folder: Path) -> tuple[int, int, int]:
    """Numbers that are trained, that an adapter's file holds beside them, and that the statistics' files hold."""
    import torch
    import transformers

    from dist_subspace.families.classes import AUTO_CLASSES
    from dist_subspace.loading.load import model_config
    from dist_subspace.placement.tensors import gathered
    from dist_subspace.storage import adopt_all
    from dist_subspace.subspace import SubspaceLinear, attach_method, attached, trainable_parameters
    from dist_subspace.training.sections import subspace_config

    described = model_config(folder, config.model.trust_remote_code)
    trusted = {"trust_remote_code": True} if config.model.trust_remote_code else {}
    with torch.device("meta"):
        built = getattr(transformers, AUTO_CLASSES[config.model.task]).from_config(described, **trusted)
    adopt_all(built)
    attach_method(built, subspace_config(config), gathered)
    parts: Iterable[Any] = [part for part in built.modules() if isinstance(part, SubspaceLinear)]
    statistic = attached(built).info.statistic
    factors = sum(_factor_numbers(statistic, part.in_features, part.out_features, part.settings) for part in parts)
    kept = factors if any(getattr(part, "kept_factors", ()) for part in parts) else 0
    return sum(weight.numel() for weight in trainable_parameters(built)), kept, factors


def _factor_numbers(statistic: str, d_in: int, d_out: int, settings: Any) -> int:
    """The most numbers that a layer's statistic has: left and right vectors and values."""
    if statistic == "none":
        return 0
    if statistic == "row norms":
        return d_out
    whole = min(d_in, d_out)
    if statistic == "full SVD":
        vectors = settings.options.get("top_k") or whole
    else:
        vectors = min(whole, settings.rank or whole)
    return int(vectors * (d_in + d_out + 1))


def _bytes(path: str) -> int:
    file = Path(path).expanduser()
    return file.stat().st_size if file.is_file() else 0
