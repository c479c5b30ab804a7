"""What the model's small files decide about a run's data: tokenizer, new tokens, positions. Local; reads no weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.loading.load import model_positions
from dist_subspace.loading.tokenizer import extend_tokenizer, load_tokenizer
from dist_subspace.subspace import AddsPositions, Resolved, SubspaceConfig, TextOptions, resolve
from dist_subspace.training.beginning import Beginning
from dist_subspace.training.sections import subspace_config
from dist_subspace.training.vocabulary import embedding_rows, without_gap


@dataclass(frozen=True)
class Materials:
    """What text becomes tokens with, and the method that is trained on them."""

    config: Config
    """As it was given, with the `data.max_length` that the model has positions for."""
    folder: Path
    """The model's, on this machine."""
    tokenizer: Any
    rows: int | None
    """Of the model's embedding, as its configuration says."""
    subspace: SubspaceConfig
    resolved: Resolved
    first_position: int
    """The position id of a row's first token, as the model counts."""


def read_materials(
    folder: Path, config: Config, beginning: Beginning | None, notice: Callable[[str], None]
) -> Materials:
    """From the model's local folder.

    Raises:
        UsageError: what does not go together, with one sentence.
    """
    tokenizer = load_tokenizer(str(folder), config.model.tokenizer, config.model.trust_remote_code)
    rows = embedding_rows(folder, config.model.trust_remote_code)
    subspace = subspace_config(config) if beginning is None else beginning.config
    subspace = with_tokens(subspace, resolve(subspace), tokenizer, config, rows, notice)
    if beginning is not None:
        beginning.check_tokens(tuple(subspace.new_tokens), config.model.new_tokens)
    resolved = resolve(subspace)
    config, first = fitted(folder, config, resolved, notice)
    return Materials(config, folder, tokenizer, rows, subspace, resolved, first)


def with_tokens(
    subspace: SubspaceConfig,
    resolved: Resolved,
    tokenizer: Any,
    config: Config,
    rows: int | None,
    notice: Callable[[str], None],
) -> SubspaceConfig:
    """The subspace with what only a tokenizer knows: ids of the new tokens, which it gets here, and of texts in options.

    `rows`: of the model's embedding, as its configuration says.
    """
    names = config.model.new_tokens
    known = [name for name in names if name in tokenizer.get_vocab()] if names else []
    if known:
        notice(f"model.new_tokens has {', '.join(known)}, which the tokenizer knows already: their rows begin anew")
    ids = without_gap(extend_tokenizer(tokenizer, names), rows, tokenizer, notice)
    subspace, method = replace(subspace, new_tokens=ids), resolved.method
    return method.read_text(subspace, tokenizer) if issubclass(method, TextOptions) else subspace


def fitted(folder: Path, config: Config, resolved: Resolved, notice: Callable[[str], None]) -> tuple[Config, int]:
    """The configuration with rows that are within the model's positions, the virtual tokens of a method that has some among
    them: a `data.max_length` that nobody gave becomes what there is room for, and that is said.

    Returns:
        The configuration, and the position id of a row's first token, as the model counts.

    Raises:
        UsageError: naming what was given and is too large, and packing where positions that begin anew are not the model's.
    """
    method, trusted = resolved.method, config.model.trust_remote_code
    virtual = method.added_positions(resolved.settings) if issubclass(method, AddsPositions) else 0
    wanted = config.data.max_length + virtual
    positions = model_positions(folder, config.model.task, wanted, trusted)
    if positions.longest is not None and wanted > positions.longest:
        room = positions.longest - virtual
        less = f" less the {virtual} virtual tokens of method {resolved.info.name}" if virtual else ""
        if "max_length" in config.data.model_fields_set or room < 2:
            raise UsageError(
                f"data.max_length is {config.data.max_length}; accepted: at most {room}, the model's positions{less}"
            )
        notice(f"data.max_length is not given: it is {room:,}, the model's positions{less}")
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": room})})
    if positions.first and config.data.packing and config.model.task == "causal-lm":
        raise UsageError(
            f"data.packing is true, but the positions of this model begin at {positions.first}, which packed samples do not; "
            "accepted: false"
        )
    return config, positions.first
