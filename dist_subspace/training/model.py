"""The model of a run: loaded, with its method on it, and set up for training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dist_subspace.api import attach
from dist_subspace.families.heads import classification_heads
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.loading.load import fresh_modules, load_frozen, remember_source
from dist_subspace.loading.positions import count_from
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import on_main
from dist_subspace.subspace import SubspaceConfig, schedule_class_of
from dist_subspace.training.beginning import attach_beginning
from dist_subspace.training.data import enable_packing
from dist_subspace.training.engine_config import engine_config
from dist_subspace.training.observer import Observer
from dist_subspace.training.plan import Plan


def make_model(plan: Plan, observer: Observer) -> nn.Module:
    """Collective: what the plan says, in training mode, before there is an engine."""
    with heard(observer.notice):
        model = _attached(plan, observer, _loaded(plan, observer))
    training = plan.config.training
    if training.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        observer.notice(
            f"training.gradient_checkpointing is true, but transformers has none for {type(model).__name__}: not used"
        )
    elif training.gradient_checkpointing:
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(training.gradient_checkpointing_kwargs.model_dump())  # the older name is on its way out
    if plan.batches.packing:
        enable_packing(model)
    count_from(model, plan.first_position)
    observer.model_ready(model)
    return model.train()


def _loaded(plan: Plan, observer: Observer) -> nn.Module:
    config = plan.config
    with observer.loading("reading the model") as progress:
        model = load_frozen(
            plan.model_folder,
            storage=config.model.storage,
            double_quant=config.model.double_quant,
            storage_options=config.model.storage_options,
            head_storage=config.model.head_storage,
            deepspeed=engine_config(plan, model=None),
            task=config.model.task,
            dtype=plan.dtype,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
            experts_at_once=config.model.experts_at_once,
            seed=config.training.seed,
            progress=progress,
            **_head_settings(plan),
        )
    remember_source(model, plan.model_folder, config.model.revision)
    return model


def _attached(plan: Plan, observer: Observer, model: nn.Module) -> nn.Module:
    # A method with a schedule decomposes in the middle of training.
    scheduled = schedule_class_of(plan.resolved.method) is not None
    with observer.statistics("none" if scheduled else plan.resolved.info.statistic) as progress:
        subspace, cache = with_head(plan, model), plan.run_dir.factors
        if plan.beginning is not None:
            return attach_beginning(model, subspace, plan.beginning, cache, progress)
        # A method's own targets may mean more layers today than when the run began.
        only = on_main(_layers, plan.checkpoint[0]) if plan.checkpoint is not None else ()
        return attach(model, subspace, cache=cache, progress=progress, only=only)


def _layers(checkpoint: Path) -> list[str]:
    return AdapterFolder(checkpoint).layers


def with_head(plan: Plan, model: nn.Module) -> SubspaceConfig:
    """The subspace configuration; a classification head, and a pooler that the checkpoint lacks, are new: they are trained in
    full and saved with the adapter."""
    if plan.config.model.task != "classification":
        return plan.subspace
    heads = classification_heads(model)
    poolers = [name for name in fresh_modules(model) if name.partition(".")[0] not in heads]
    wanted = tuple(dict.fromkeys([*plan.subspace.modules_to_save, *heads, *poolers]))
    return replace(plan.subspace, modules_to_save=wanted)


def _head_settings(plan: Plan) -> dict[str, Any]:
    """What a classification model is told: its labels, and which id pads (it looks for the last token that is none)."""
    if plan.data.labels is None:
        return {}
    names = dict(enumerate(map(str, plan.data.labels)))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {label: number for number, label in names.items()},
        "pad_token_id": plan.pad_id,
    }
