"""Tensors of a checkpoint that the model has no place for: harmless, worth saying, or a sign that the model is another one.

What a family's own list names is harmless, and so are tables that a model computes itself. A whole module that the class lacks
(a vision tower, another task's head) is said. A tensor that belongs to a module that is there (a bias, a scale, a LoRA factor,
a layer beyond the configuration's) changes what that module computes: without it the model is another function than the one
that was saved, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from dist_subspace.errors import UsageError
from dist_subspace.families.buffers import is_computed
from dist_subspace.families.configuration import BIAS_SWITCHES, extra_layers
from dist_subspace.families.heads import base_prefix
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.transformers_internals import reported_keys

# What a wrapper puts before, or between, a model's names.
WRAPPERS = (
    "base_model.model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",
    "original_module",
    "module",
)
ADAPTERS = re.compile(
    r"(^|\.)(lora_\w+|loha_\w+|lokr_\w+|hada_\w+|ia3_\w+|vera_\w+|oft_\w+|boft_\w+|ranknum|modules_to_save|trainable_tokens_\w+)"
    r"(\.|$)"
)
SCALES = re.compile(
    r"^(weight_scale\w*|weight_(packed|shape|zero_point|g_idx|format)|\w*_scale|scales?|scale_inv|zero_point|qweight|qzeros|"
    r"g_idx|absmax|quant_map|nested_\w+|SCB|CB|weight\..+|quant_state\..*)$"
)
SHOWN = 3


def examine(model: PreTrainedModel, index: CheckpointIndex, unused: Mapping[str, str]) -> list[str]:
    """What is worth saying about keys without a place, one sentence each.

    Arguments:
        unused: key -> the name that transformers gives it in this model.

    Raises:
        UsageError: a key that says that the model is another one; it says which, and what to do.
    """
    _, reported = reported_keys(model, (), unused.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {name for name, _ in model.named_buffers(remove_duplicate=False)} | set(model.state_dict())
    lists = _configured_extra_layers(model)
    apart: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for key, name in unused.items():
        if name not in reported or name in known:
            continue  # a list of transformers has it, or it is a buffer that is computed
        kind, root = _classify(name, modules, known, base_prefix(model), index.shapes[key], lists)
        if kind == "apart":
            apart.setdefault(root, []).append(key)
        elif kind != "computed":
            refused.setdefault(kind, []).append(key)
    for kind, meaning in _REFUSED.items():
        if kind in refused:
            held = _first_few(refused[kind])
            if kind == "quantised" and index.in_file is not index:
                meaning = _NOT_NAMED
            raise UsageError(
                f"model.path is {str(index.folder)!r}, which holds {held}: {meaning.format(name=type(model).__name__)}"
            )
    if not apart:
        return []
    parts = [f"{root} ({len(keys)} tensor{'s' if len(keys) > 1 else ''})" for root, keys in apart.items()]
    listed = _first_few(parts, 6)
    return [f"{index.folder} holds tensors that {type(model).__name__} has no place for, which are not read: {listed}"]


# kind -> what is said of its keys; the first that occurs is said.
_REFUSED = {
    "adapter": "parts of an adapter, which the plain model would not apply; merge it first (PEFT: merge_and_unload, then "
    "save_pretrained), or give the base model here and import the adapter",
    "wrapped": "names of a wrapped model (torch.compile, DDP, FSDP or PEFT), for which {name} has no place; save the model that "
    "is inside the wrapper, or strip the wrapper's part from the keys",
    "quantised": "scales of quantised weights, but config.json has no quantization_config, and without them the weights mean "
    "nothing; give the 16-bit model, or the config.json that the weights were saved with",
    "bias": "biases of layers that have none by config.json; use the config.json that the weights were saved with, or set the "
    f"family's switch there ({', '.join(BIAS_SWITCHES[:4])}), where it has one, to true",
    "layer": "layers beyond those of config.json, without which the model would be cut short; set num_hidden_layers (or the "
    "family's name for it) to that of the weights",
    "extra": "tensors of modules that have no such tensor by config.json, so that the model would compute something else; use "
    "the config.json that the weights were saved with",
}

_NOT_NAMED = (
    "scales of quantised weights that are in another format than config.json's quantization_config says, and without them the "
    "weights mean nothing; give the 16-bit model, or the config.json that the weights were saved with"
)


def _classify(
    name: str,
    modules: Mapping[str, nn.Module],
    known: set[str],
    prefix: str,
    shape: tuple[int, ...],
    extra_layers: Mapping[str, int],
) -> tuple[str, str]:
    """The kind of a name without a place, and, for one that is apart, the module that the model lacks."""
    if ADAPTERS.search(name):
        return "adapter", ""
    if _unwrapped(name, known, prefix):
        return "wrapped", ""
    parts = name.split(".")
    depth = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in modules), 0)
    owner, rest = ".".join(parts[:depth]), parts[depth:]
    module = modules[owner]
    if depth == 0:
        return "apart", parts[0]
    if isinstance(module, nn.ModuleList) and rest[0].isdigit():
        configured = int(rest[0]) - len(module) < extra_layers.get(owner.rpartition(".")[2], 0)
        return ("apart", f"{owner}.{rest[0]}") if configured else ("layer", "")
    if any(map(is_computed, rest)) or (rest == ["bias"] and len(shape) > 1):
        return "computed", ""
    if len(rest) > 1 and next(module.children(), None) is not None:
        return "apart", f"{owner}.{rest[0]}"
    if SCALES.match(".".join(rest)):
        return "quantised", ""
    return ("bias", "") if rest == ["bias"] else ("extra", "")


def _unwrapped(name: str, known: set[str], prefix: str) -> bool:
    """Whether the name is one of the model's with a wrapper's parts in it."""
    stripped = name
    for wrapper in WRAPPERS:
        stripped = re.sub(rf"(^|\.){re.escape(wrapper)}\.", r"\1", stripped)
    if stripped == name:
        return False
    bare = stripped.removeprefix(f"{prefix}.") if prefix else stripped
    return bool(known & {stripped, bare, f"{prefix}.{stripped}"})


def _configured_extra_layers(model: PreTrainedModel) -> dict[str, int]:
    """How many layers beyond a list the configuration itself names, by the list's name: those for the prediction of several
    tokens, which the class leaves out."""
    more = extra_layers(model.config)
    return {"layers": more} if more else {}


def _first_few(names: Iterable[str], shown: int = SHOWN) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
