"""What is said of a model's adapter: PEFT's entries, in PEFT's names and meaning, and our own. Local; nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_subspace.families.classes import task_of_class
from dist_subspace.families.configuration import text_config
from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.families.names import ends_with
from dist_subspace.interchange.base_model import base_name, is_local
from dist_subspace.interchange.description import FORMAT, OWN, STACKS, TURNED
from dist_subspace.interchange.fitting import taken_as_turned
from dist_subspace.interchange.model_card import PEFT_TASKS
from dist_subspace.loading.load import source_revision
from dist_subspace.loading.own_class import own_class
from dist_subspace.storage import FrozenLinear, FrozenStack, PackedLinear
from dist_subspace.subspace import Attachment, Settings, StackedPart, SubspaceLinear, attached, file_options_of

# Our name of a task -> PEFT's task_type.
TASK_TYPES = {task: theirs for theirs, (_, task) in PEFT_TASKS.items()}
NEEDS_HEAD = (TASK_TYPES["classification"], TASK_TYPES["token-classification"])


def adapter_config(model: nn.Module, base_model: str | None = None) -> dict[str, Any]:
    """The adapter's description. Keys that PEFT reads have PEFT's names and meaning; ours are under `dist_subspace`.

    Arguments:
        base_model: where the base was loaded from; unset: what the model's configuration says.
    """
    attachment = attached(model)
    resolved, config = attachment.resolved, attachment.config
    parts = {name: model.get_submodule(name) for name in attachment.layers}
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    settings = _usual(attachment, parts, (*ranks, *alphas))
    ours = config.as_dict() | {"options": file_options_of(resolved.method, config.options)}
    ours |= {"rank": _usual(attachment, parts, ranks).rank or None, "alpha": resolved.settings.alpha or None}
    ours |= {"alpha_pattern": _own_alphas(parts, resolved.settings.alpha) | dict(config.alpha_pattern)}
    path = base_model or getattr(getattr(model, "config", None), "name_or_path", None)
    described: dict[str, Any] = {
        "peft_type": _peft_type(model),
        "base_model_name_or_path": base_name(path),
        **_revision(model, path),
        "task_type": _task_type(model, attachment.saved_modules),
        "inference_mode": True,
        "target_modules": _endings(model, attachment.layers),
        "modules_to_save": list(attachment.saved_modules) or None,
    }
    words = resolved.method.peft
    if described["peft_type"] and words is not None:
        described |= words.entries(settings)
        described |= {"fan_in_fan_out": _transposed(parts)} if words.on_conv1d else {}
        described |= _patterns(parts, described) if words.has_patterns else {}
        described |= words.model_entries(parts[attachment.layers[0]])
        if described["task_type"] is None:  # PEFT's auto class goes by the model's own then
            described["auto_mapping"] = {
                "base_model_class": type(model).__name__,
                "parent_library": type(model).__module__,
            }
    # Of tokens that stand beside the model; PEFT's files of them know no layers.
    if described["target_modules"] is None:
        described = {key: value for key, value in described.items() if key not in ("target_modules", "fan_in_fan_out")}
    shapes = {name: shape for name, part in parts.items() if (shape := _shape(part))}
    biased = [name for name in shapes if parts[name].bias is not None]
    about = {
        "layers": list(parts),
        "shapes": shapes,
        "biased": biased,
        **_stacks(model, parts),
        "conv1d": _transposed(parts),
        "base": _base(model),
        **_own_class(model, [*parts, *attachment.saved_modules]),
    }
    return described | {OWN: {"format": FORMAT, **about, **ours}}


def _revision(model: nn.Module, path: str | None) -> dict[str, str]:
    """PEFT's entry for the revision of a hub name, where one was asked for."""
    revision = source_revision(model)
    return {} if revision is None or is_local(base_name(path) or ".") else {"revision": revision}


def _own_class(model: nn.Module, modules: list[str]) -> dict[str, Any]:
    """For a text model of a larger family: the class that the checkpoint names, and how that calls these modules."""
    larger = own_class(model)
    return {} if larger is None else {"own_class": {"name": larger.name, "names": larger.of(modules)}}


def _endings(model: nn.Module, layers: tuple[str, ...]) -> list[str]:
    """Target names for PEFT: the shortest endings if they mean the same layers, else the whole names."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    also = {name for name in linear if name.rpartition(".")[2] in endings and not name.endswith(".base")}
    return endings if also == set(layers) else sorted(layers)


def _shape(part: nn.Module) -> list[int] | None:
    """`[d_out, d_in]` of a linear layer: with it, what an adapter does to the layer can be told without the base model."""
    return [part.out_features, part.in_features] if isinstance(part, SubspaceLinear) else None


def _stacks(model: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """`[experts, d_out, d_in]` of the stacks of experts, where there are any, and those whose layout PEFT takes for the other."""
    held = {name: part.base for name, part in parts.items() if isinstance(part, StackedPart)}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in held}
    turned = [name for name, stack in held.items() if taken_as_turned(owners[name], stack.transposed)]
    stacks = {name: [stack.experts, *stack.expert_shape] for name, stack in held.items()}
    return ({STACKS: stacks} if stacks else {}) | ({TURNED: turned} if turned else {})


def _usual(attachment: Attachment, parts: Mapping[str, nn.Module], patterns: Iterable[str]) -> Settings:
    """The settings that a layer has, unless one of the patterns names it; those of the first where they name every layer."""
    endings = tuple(patterns)
    usual = [name for name in parts if not any(ends_with(name, ending) for ending in endings)]
    return parts[usual[0] if usual else attachment.layers[0]].settings  # type: ignore[return-value]


def _patterns(parts: Mapping[str, nn.Module], described: Mapping[str, Any]) -> dict[str, Any]:
    """Layers whose rank or alpha differ from the rest, by whole name, as PEFT's patterns have them."""
    settings: dict[str, Settings] = {name: part.settings for name, part in parts.items()}  # type: ignore[misc]
    ranks = {name: layer.rank for name, layer in settings.items() if layer.rank != described["r"]}
    alphas = {name: layer.alpha for name, layer in settings.items() if layer.alpha != described["lora_alpha"]}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _own_alphas(parts: Mapping[str, nn.Module], usual: float) -> dict[str, float]:
    """Layers whose alpha is another than the file's: one that was not given follows a layer's own rank."""
    settings = {name: part.settings for name, part in parts.items() if isinstance(part, SubspaceLinear)}
    return {name: layer.alpha for name, layer in settings.items() if usual and layer.alpha != usual}


def _base(model: nn.Module) -> dict[str, Any]:
    """How the base was held while the adapter was trained beside it: what a merge of the folder alone loads again."""
    head = output_embeddings(model)
    head = getattr(head, "base", getattr(head, "original", head))  # below a method, or beside a copy that is trained
    operators = [m for m in model.modules() if isinstance(m, FrozenLinear | FrozenStack) and m is not head]
    held = next((m for m in operators if not m.is_float), operators[0] if operators else None)
    task = task_of_class(type(model).__name__)
    if task == "seq2seq-lm" and not _has_encoder(model):
        task = "causal-lm"
    options = {} if held is None else held.options()
    return {
        "storage": getattr(held, "storage", None),
        "double_quant": options.pop("double_quant", False),
        **({"storage_options": options} if options else {}),
        **({"head_storage": head.storage} if isinstance(head, PackedLinear) else {}),
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "task": task,
        **(_labels(model) if "classification" in task else {}),
    }


def _labels(model: Any) -> dict[str, Any]:
    """What a classification model's configuration was told: its labels, and which id pads (the last token is one that is
    none)."""
    names = ("id2label", "label2id", "pad_token_id")
    config = getattr(model, "config", None)
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _peft_type(model: nn.Module) -> str | None:
    """PEFT's name of the method, where PEFT would compute the same from these files."""
    attachment = attached(model)
    words, parts = attachment.resolved.method.peft, [model.get_submodule(name) for name in attachment.layers]
    if words is None or not words.writes or any(isinstance(part, StackedPart) for part in parts):
        return None
    agrees = all(map(words.agrees, parts))
    placed = words.on_conv1d or not any(map(_is_conv1d, parts))
    alike = words.has_patterns or all(part.settings == parts[0].settings for part in parts)
    return words.peft_type if agrees and placed and alike and not attachment.config.new_tokens else None


def _transposed(parts: Mapping[str, nn.Module]) -> bool:
    """Whether the base model's own layers are Conv1D, which PEFT calls `fan_in_fan_out`."""
    return any(map(_is_conv1d, parts.values()))


def _is_conv1d(part: nn.Module) -> bool:
    return isinstance(part, SubspaceLinear) and bool(getattr(part.base, "conv1d", False))


def _task_type(model: nn.Module, saved_modules: tuple[str, ...]) -> str | None:
    """PEFT's task. For classification PEFT expects a trained head in the file, so without one it is told no task."""
    task = TASK_TYPES.get(task_of_class(type(model).__name__))
    if task in NEEDS_HEAD and not saved_modules:
        return None
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and not _has_encoder(model) else task


def _has_encoder(model: Any) -> bool:
    """Vision and language models generate conditionally too, and most have a decoder alone."""
    config = model.config
    return bool(config.is_encoder_decoder or text_config(config).is_encoder_decoder)
