"""Everything about an evaluation that can be read, and refused, before a weight is loaded. Local: rank 0 reads for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_subspace.adapted.opened import tokenizer_of
from dist_subspace.adapted.source import Source, find_source
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.choices import Choices, read_choices
from dist_subspace.evaluation.figures import CHOICES
from dist_subspace.evaluation.samples import Samples, read_samples
from dist_subspace.evaluation.subject import Subject, find_subject
from dist_subspace.interchange.peft.importing import read_peft
from dist_subspace.loading.load import model_positions, resolve_folder
from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.subspace import AddsPositions, SubspaceConfig, resolve
from dist_subspace.training.data.cutting_text import cutting_text
from dist_subspace.training.data.sources import EVAL, open_source
from dist_subspace.training.sections import data_settings
from dist_subspace.training.vocabulary import check_ids_of, embedding_rows


@dataclass(frozen=True)
class Material:
    """subject: with the configuration that the data was read by; metrics: the figures to be made; choices: the questions, where
    some are asked; adapter_config: of the method, None for a base alone."""

    subject: Subject
    metrics: tuple[str, ...]
    samples: Samples
    choices: Choices | None


def read_subject(asked: Asked) -> Subject:
    """Local: what is measured.

    Raises:
        UsageError: as `find_subject`, and for options that contradict each other or the configuration.
    """
    asked.check()
    subject = find_subject(asked.target, asked.base, asked.data, asked.overrides, tasks=bool(asked.tasks))
    if asked.compare_base and subject.config.model.task == "classification":
        raise UsageError(
            "--compare-base is given, and the adapter classifies: the base has no head of its own to compare with; accepted: "
            "--compare-base with a language model"
        )
    return subject


def read_material(asked: Asked, subject: Subject, show: bool, notice: Callable[[str], None]) -> Material:
    """Local: samples and questions, tokenised.

    Arguments:
        show: whether progress is shown.

    Raises:
        UsageError: an unknown figure, data that cannot be read, samples that the model has no room or no rows for, a label that
            training never saw.
    """
    metrics = asked.metrics_for(subject.config)
    if subject.config.model.task == "classification" and subject.labels is None:
        raise UsageError(
            f"{subject.name!r} does not say which labels its classes have; accepted: an adapter or a run of dist_subspace"
        )
    source = None if subject.adapter is None else find_source(subject.adapter)
    method = None if source is None else _config_of(source)
    base = _base_of(subject, source)
    revision = _revision_of(subject, source, base)
    folder = resolve_folder(base, revision)
    config = with_length(subject, folder, method)
    tokenizer = _tokenizer(subject, source, base, revision)
    samples = read_samples(config, tokenizer, subject.labels, _cache(subject), asked.limit, show)
    rows = embedding_rows(folder, config.model.trust_remote_code)
    new_ids = () if method is None else tuple(method.new_tokens)
    check_ids_of(samples.table, [samples.name], tokenizer, rows, new_ids)
    choices = _choices(asked, config, tokenizer) if asked.needs(metrics, CHOICES) else None
    if choices is not None:
        check_ids_of(choices.table, [samples.name], tokenizer, rows, new_ids)
        if choices.left_out:
            notice(f"{choices.left_out:,} records are left out: a choice of theirs is longer than data.max_length")
    for sentence in samples.notices:
        notice(sentence)
    for sentence in cutting_text(samples.cutting, config.data.max_length)[0] if samples.cutting is not None else ():
        notice(sentence)
    return Material(subject.with_config(config), metrics, samples, choices)


def with_length(subject: Subject, folder: Path, method: SubspaceConfig | None) -> Config:
    """The configuration with a `max_length` that the model has positions for. One that nobody has given is as long as they are.

    Raises:
        UsageError: one that was given and is longer.
    """
    config, virtual = subject.config, 0
    if method is not None and issubclass((resolved := resolve(method)).method, AddsPositions):
        virtual = resolved.method.added_positions(resolved.settings)
    wanted = config.data.max_length + virtual
    longest = model_positions(folder, config.model.task, wanted, config.model.trust_remote_code).longest
    if longest is None or wanted <= longest:
        return config
    if subject.run is not None or "data.max_length" in subject.given:
        raise UsageError(
            f"data.max_length is {config.data.max_length}; accepted: at most {longest - virtual}, the model's positions"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest - virtual})})


def _config_of(source: Source) -> SubspaceConfig:
    return source.adapter.config if source.adapter.ours else read_peft(source.adapter).config


def _base_of(subject: Subject, source: Source | None) -> str:
    if subject.base is not None or source is None:
        return str(subject.base)
    return source.adapter.find_base(base_fingerprint)


def _revision_of(subject: Subject, source: Source | None, base: str) -> str | None:
    """The revision of the base's hub name: what is given, or what the adapter says of the base that it names."""
    if source is None:
        return subject.config.model.revision
    described = source.adapter.described
    named = base == described.get("base_model_name_or_path") and not Path(base).expanduser().is_dir()
    return described.get("revision") if named else None


def _tokenizer(subject: Subject, source: Source | None, base: str, revision: str | None) -> Any:
    section = subject.config.model
    if source is not None:
        return tokenizer_of(source, base, revision)
    return load_tokenizer(str(resolve_folder(base, revision)), section.tokenizer, section.trust_remote_code)


def _cache(subject: Subject) -> Path | None:
    """The folder of tokens that the run has made, where this user may write to it."""
    if subject.config.data.cache_dir is not None:
        return Path(subject.config.data.cache_dir)
    tokens = None if subject.run is None else subject.run.tokens
    return tokens if tokens is not None and tokens.is_dir() and os.access(tokens, os.W_OK) else None


def _choices(asked: Asked, config: Config, tokenizer: Any) -> Choices:
    settings = data_settings(config.data)
    if not isinstance(settings.eval, str):
        raise UsageError(
            f"data.eval is {settings.eval}, a part of the training data, of whose records no choices are read; accepted with "
            "--choice and --choices-field: --data FILE"
        )
    source = open_source(settings.eval, settings.eval_split, EVAL)
    records = list(source.read())[: asked.limit]
    return read_choices(records, source.name, settings, tokenizer, asked.choices)
