"""The only file that touches transformers below its public surface.

Read against transformers 5.23.0 (`modeling_utils.py`, `initialization.py`, `conversion_mapping.py`, `core_model_loading.py`,
`integrations/deepspeed.py`); tests/loading/test_transformers_internals.py fails when what is used here moves.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.integrations.deepspeed as hf_deepspeed
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.utils.loading_report import LoadStateDictInfo

from dist_subspace.families.heads import base_prefix


def build_skeleton(auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """The model with every parameter on the meta device, none tied to another, and every buffer real (they are computed, and
    in no checkpoint). What is to be tied, `tie` ties, once it is known what the checkpoint holds."""
    with no_init_weights(), no_tie_weights(), _no_zero_init(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, **kwargs)
    _compute_buffers(model)
    return model


def build_again(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same of a class that is known (`_from_config`, which the auto classes call)."""
    with no_init_weights(), no_tie_weights(), _no_zero_init(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    _compute_buffers(model)
    return model


@contextmanager
def _no_zero_init() -> Iterator[None]:
    """`TrainingArguments(deepspeed=...)` and `HfDeepSpeedConfig` leave a reference (`_hf_deepspeed_config_weak_ref`) by which
    `from_config` wraps itself in `zero.Init`: empty parameters cannot be split, and ours are split as they are read."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept


def _compute_buffers(model: nn.Module) -> None:
    """Fill buffers as `from_pretrained` does: made under the model's default type, which says what they are held in, and
    filled again outside it, in float32 (`initialize_weights`). A table computed under bfloat16 is wrong from 256 on."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    if hasattr(model, "initialize_weights"):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.initialize_weights()  # type: ignore[operator]


def initialise(model: nn.Module, module: nn.Module, seed: int) -> None:
    """Give a module that the checkpoint lacks (a new classification head, a table of sinusoids) the model family's own initial
    values, equal on every rank (`_init_weights` of the innermost model that holds it, `_is_hf_initialized`)."""
    owners = [m for m in model.modules() if hasattr(m, "_init_weights") and any(part is module for part in m.modules())]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        owners[-1]._init_weights(module)  # type: ignore[operator]


@dataclass
class Conversion:
    """Tensors of a checkpoint that become other tensors of the model (`WeightConverter`): experts that are stacked, a fused
    projection that is split. name: of the first that is made; sources: (pattern, key) in transformers' order."""

    name: str
    converter: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)

    def tensors(
        self, read: Callable[[str], Tensor], config: PretrainedConfig, model: PreTrainedModel | None = None
    ) -> dict[str, Tensor]:
        """The tensors that it makes, by their names in the model; all sources are read. Of meta tensors it makes meta tensors of
        the right shapes. A few operations ask the empty model for the shapes that it has."""
        converter: Any = copy.deepcopy(self.converter)
        for pattern, key in self.sources:
            converter.add_tensor(self.name, key, pattern, read(key))
        converted = converter.convert(self.name, model=model, config=config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}


@dataclass
class KeyPlan:
    """What becomes of each key of a checkpoint. direct: name in the model -> keys that give it as it is (one, or duplicates);
    unused: key -> the name that transformers gives it, which the model has not."""

    direct: dict[str, list[str]] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)


def key_plan(model: PreTrainedModel, keys: Iterable[str]) -> KeyPlan:
    """The plan by transformers' own way from keys to names (`convert_and_load_state_dict_in_model`). Families whose modules were
    renamed keep the old names in files (GPT-NeoX's `embed_out` is `lm_head`); a body's checkpoint lacks its head model's
    prefix."""
    held = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = base_prefix(model)
    plan = KeyPlan()
    conversions: dict[str, Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):  # type: ignore[arg-type]
        name, pattern = rename_source_key(key, renamings, converters, prefix, held)
        if name not in held and key in held:
            name, pattern = rename_source_key(key, [], [], prefix, held)
        if name not in held:
            plan.unused[key] = name
        elif pattern is None:
            plan.direct.setdefault(name, []).append(key)
        else:
            conversion = conversions.setdefault(name, Conversion(name, by_pattern[pattern]))
            conversion.sources.append((pattern, key))
    plan.conversions = list(conversions.values())
    return plan


def reported_keys(model: PreTrainedModel, missing: Iterable[str], unused: Iterable[str]) -> tuple[set[str], set[str]]:
    """The missing and the unused names that transformers itself would report (`_keys_to_ignore_on_load_missing` and
    `_unexpected`, and a few more); what a family never saves (`_keys_to_ignore_on_save`) is not missing either."""
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unused),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys - set(getattr(model, "_keys_to_ignore_on_save", None) or ()), info.unexpected_keys


def kept_type(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """The type that the family keeps a parameter or buffer in, whatever the model's (`_get_dtype_plan`: T5's `wo` in float16,
    routers in any 16 bits); None where it is the model's."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    patterns = [(re.compile(pattern.replace("*", ".*")), kind) for pattern, kind in plan.items()]
    return lambda name: next((kind for pattern, kind in patterns if pattern.search(name)), None)


def tied_pairs(model: nn.Module) -> dict[str, str]:
    """The pairs that class and configuration tie, parameter -> the one that it is tied to (`all_tied_weights_keys`)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie(model: PreTrainedModel, missing: set[str]) -> None:
    """Tie the empty parameters as `from_pretrained` does (`tie_weights`): where the checkpoint holds one of two, both are that
    one; where it holds both, which `missing` says, they stay two. Then nothing ties these later: neither the family's list
    nor, where no pair is left, `tie_word_embeddings` says so (unless the forward reads it: T5's relatives scale by it)."""
    pairs = tied_pairs(model)
    if not pairs:
        return
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    every = dict(model.named_parameters(remove_duplicate=False))
    apart = {target for target, source in pairs.items() if every.get(target) is not every.get(source)}
    for prefix, part in model.named_modules(remove_duplicate=False):
        if apart and hasattr(part, "get_expanded_tied_weights_keys"):
            _keep_apart(part, f"{prefix}." if prefix else "", apart)
    if apart and not model.get_expanded_tied_weights_keys(all_submodels=True):
        say_untied(model, model.config)


def _keep_apart(part: Any, prefix: str, apart: set[str]) -> None:
    for name, pairs in (
        ("_tied_weights_keys", part.get_expanded_tied_weights_keys(all_submodels=False)),
        ("all_tied_weights_keys", tied_pairs(part)),
    ):
        left = {target: source for target, source in pairs.items() if prefix + target not in apart}
        if len(left) < len(pairs):
            setattr(part, name, left)


def say_untied(model: nn.Module, config: PretrainedConfig) -> None:
    """Set `tie_word_embeddings: false`, where no forward of the family reads it as something else."""
    if "tie_word_embeddings" not in inspect.getsource(type(model).forward):
        config.tie_word_embeddings = False


def forget_quantization(model: nn.Module) -> None:
    """Take away the marks at which transformers' Trainer refuses to train a quantised model: its layers are plain frozen
    operators now."""
    for mark in ("is_quantized", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config


def written_keys(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The key under which transformers itself would save each parameter of the model: `key_plan` the other way round
    (`reverse_transform`). Prefixes are left as the model has them, and tensors that it would split or join too; experts are
    for `split_stacks`."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming) and not isinstance(t, PrefixChange)]
    backwards = [renaming.reverse_transform() for renaming in reversed(renamings)]
    keys = {}
    for name in names:
        key = name
        for renaming in backwards:
            key = renaming.rename_source_key(key)[0]
        keys[name] = key
    return keys


@dataclass(frozen=True)
class SplitStack:
    """How a stack of experts is each expert's tensors in the family's files (`WeightConverter.convert`, backwards)."""

    name: str  # the stack's in the model
    target: str  # as transformers calls what is made, which it fills in
    converter: Any
    renamings: list[Any]
    model: PreTrainedModel
    config: PretrainedConfig

    def __call__(self, tensor: Tensor) -> dict[str, Tensor]:
        """The experts' tensors by key, in order. Of a meta tensor it makes such."""
        converter = copy.deepcopy(self.converter)
        converter.add_tensor(self.target, self.name, converter.source_patterns[0], tensor)
        made = converter.convert(self.target, model=self.model, config=self.config)
        return {apply_renamings(key, self.renamings): made[key] for key in sorted(made, key=dot_natural_key)}


def split_stacks(
    model: nn.Module, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SplitStack]:
    """The stacks of experts that transformers itself would save expert by expert (`SplitModulelist`), by name.

    Arguments:
        shapes: of the model's parameters.
    """
    stacked = [name for name, shape in shapes.items() if len(shape) == 3]
    if not stacked:
        return {}
    transforms = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    backwards = [t.reverse_transform() for t in reversed(transforms) if not isinstance(t, PrefixChange)]
    renamings = [t for t in backwards if isinstance(t, WeightRenaming)]
    converters = [t for t in backwards if isinstance(t, WeightConverter)]
    splitting = {
        t.source_patterns[0]: t
        for t in converters
        if len(t.source_patterns) == 1 and any(isinstance(op, SplitModulelist) for op in t.operations)
    }
    matched = {name: apply_converters(name, converters) for name in stacked}
    stacks = {name: (target, splitting[p]) for name, (target, p) in matched.items() if p in splitting}
    if not stacks:
        return {}
    empty = _empty_like(model, config)
    return {name: SplitStack(name, target, own, renamings, empty, config) for name, (target, own) in stacks.items()}


def expected_parameters(model: nn.Module, config: PretrainedConfig) -> dict[str, nn.Parameter]:
    """The parameters that the model's class has with this configuration, by every name (tied ones are one object); they have
    a shape and no values."""
    other = _empty_like(model, config)
    other.tie_weights()
    return dict(other.named_parameters(remove_duplicate=False))


def expected_ties(model: nn.Module, config: PretrainedConfig) -> dict[str, str]:
    """What the model's class ties with this configuration (`tied_pairs`), whatever this model's own parameters are."""
    return tied_pairs(_empty_like(model, config))


def _empty_like(model: nn.Module, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class whose parameters have a shape and no values, none of them tied."""
    with no_init_weights(), no_tie_weights(), _no_zero_init(), init_empty_weights(include_buffers=False):
        model_class: Any = type(model)
        return model_class(copy.deepcopy(config))


def empty_model(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of a class whose parameters have a shape and no values."""
    with no_init_weights(), _no_zero_init(), init_empty_weights():
        model: PreTrainedModel = model_class(config)
    model.tie_weights()
    return model


def misread(
    model: nn.Module, config: PretrainedConfig, keys: Mapping[str, Sequence[str]], split: Container[str]
) -> list[str]:
    """Of parameters that are written under these keys those that transformers would not read back as themselves: a family whose
    conversion takes the key for something else.

    Arguments:
        split: the parameters that are written as several tensors, which must become one again.
    """
    plan = key_plan(_empty_like(model, config), [key for own in keys.values() for key in own])
    joined = {conversion.name: {key for _, key in conversion.sources} for conversion in plan.conversions}

    def read_back(name: str, own: Sequence[str]) -> bool:
        return joined.get(name) == set(own) if name in split else plan.direct.get(name) == list(own)

    return [name for name, own in keys.items() if not read_back(name, own)]
