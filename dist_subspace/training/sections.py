"""The configuration's sections as the settings that the parts of a run take: each key by its name, here and nowhere else.

Ranges, names and rules over two keys are the configuration's to check (config/schema.py), and are not checked again.
"""

from __future__ import annotations

import math

from dist_subspace.config import Config
from dist_subspace.config.schema import DataSection, TrainingSection
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.training.data import BatchSettings, DataSettings
from dist_subspace.training.data.settings import is_packable
from dist_subspace.training.optimizers import AdamSettings

SHAPES = 64  # rows are padded to a multiple of this: kernels are made, and memory is kept, once for each shape


def subspace_config(config: Config) -> SubspaceConfig:
    """The section `subspace`, and `training.seed`; ids of new tokens are known when there is a tokenizer."""
    section = config.subspace
    return SubspaceConfig(
        method=section.method,
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        target_modules=section.target_modules,
        exclude_modules=section.exclude_modules,
        modules_to_save=section.modules_to_save,
        target_parameters=section.target_parameters,
        expert_parameters=section.expert_parameters,
        constraint=section.constraint,
        constraint_weight=section.constraint_weight,
        options=section.options,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        seed=config.training.seed,
    )


def data_settings(section: DataSection) -> DataSettings:
    """The section `data`, but for how rows are made of samples, which `batch_settings` takes, and where tokens are kept."""
    given = section.train
    return DataSettings(
        train=given if isinstance(given, str) else [(source.path, source.weight) for source in given],
        eval=section.eval,
        format=section.format,
        max_length=section.max_length,
        template=section.template,
        text_field=section.text_field,
        prompt_field=section.prompt_field,
        completion_field=section.completion_field,
        instruction_field=section.instruction_field,
        input_field=section.input_field,
        output_field=section.output_field,
        chosen_field=section.chosen_field,
        rejected_field=section.rejected_field,
        messages_field=section.messages_field,
        label_field=section.label_field,
        tools_field=section.tools_field,
        documents_field=section.documents_field,
        chat_template_kwargs_field=section.chat_template_kwargs_field,
        truncation=section.truncation,
        split=section.split,
        eval_split=section.eval_split,
    )


def batch_settings(config: Config) -> BatchSettings:
    packing = config.data.packing and is_packable(config.data.format)
    return BatchSettings(
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.per_device_train_batch_size,
        seed=config.training.seed,
        packing=packing,
        max_length=config.data.max_length,
        pad_to_multiple=config.data.max_length if packing else padding(config),
        segment_lengths="flash" in (config.model.attn_implementation or ""),
        objective=config.training.objective,
    )


def padding(config: Config) -> int:
    """The multiple that unpacked rows are padded to; packed ones, which are nearly full, all have `max_length`."""
    return math.gcd(SHAPES, config.data.max_length)


def adam_settings(section: TrainingSection) -> AdamSettings:
    return AdamSettings(section.rate, section.adam_beta1, section.adam_beta2, section.adam_epsilon)
