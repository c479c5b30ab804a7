"""Adapters that PEFT wrote, read as ours: a configuration of one of our methods, and tensors by the names of our own files.

Everything is checked from the two files before a model is touched. What a field would change that is not known here is refused by
the field's name: an adapter that is read must compute what PEFT computes from it. Local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_subspace.atomic_files import whole_folder
from dist_subspace.errors import UsageError
from dist_subspace.families.heads import ANSWERS, CLASSIFIERS
from dist_subspace.interchange.adapter import write_adapter
from dist_subspace.interchange.adapter_folder import AdapterFolder, has_adapter
from dist_subspace.interchange.base_model import base_name, identify_base
from dist_subspace.interchange.description import CONFIG, FORMAT, OWN, WEIGHTS
from dist_subspace.interchange.loaded_adapter import Copies, LoadedAdapter
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.peft.base_copies import split_copies
from dist_subspace.interchange.peft.experts import stacks_of_peft
from dist_subspace.interchange.peft.trained_in_full import split_saved, with_tied
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.interchange.tokenizer_files import has_tokenizer
from dist_subspace.subspace import SubspaceConfig, method_class
from dist_subspace.subspace.core.peft_words import Entries, Layers, PeftWords
from dist_subspace.subspace.core.registry import words_reading
from dist_subspace.subspace.virtual_tokens.part import VirtualTokens

# Entries of every adapter_config.json that are read below, or change nothing about a finished adapter. Its method's words say
# what is read beside them.
ENTRIES_OF_EVERY_KIND = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "target_modules",
        "modules_to_save",
        "bias",
        "fan_in_fan_out",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "exclude_modules",
        "runtime_config",
        "layers_to_transform",
        "layers_pattern",
    }
)
# The heads that PEFT trains in full for a task, whatever modules_to_save says.
HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ANSWERS}


def read_peft(folder: str | Path | AdapterFolder) -> LoadedAdapter:
    """An adapter folder that PEFT wrote, or one that is open already.

    Raises:
        UsageError: no such folder, no adapter in it, an adapter of a kind or with a field that is not known, tensors that do
            not fit together.
    """
    opened = folder if isinstance(folder, AdapterFolder) else _open(Path(folder))
    if OWN in opened.described:
        raise UsageError(f"{str(opened.path)!r} is an adapter of dist_subspace; load_adapter reads it")
    described, tensors = opened.described, opened.tensors()
    words = words_reading(described)
    _refuse_unknown(described, words, tensors)
    described = {**words.defaults, **described}
    heads = HEADS.get(str(described.get("task_type")), ())
    tensors, saved = split_saved(tensors, (*(described.get("modules_to_save") or ()), *heads))
    if described.get("ensure_weight_tying"):
        tensors, saved = with_tied(tensors, saved)
    tensors, copies = split_copies(tensors, words.tensor_prefix)
    tensors, stacks = stacks_of_peft(described, tensors, words.method)
    return _as_ours(words, described, tensors, saved, copies, stacks)


def _open(folder: Path) -> AdapterFolder:
    if not has_adapter(folder):
        pickled = (
            "; its weights are a pickle, which runs code when read" if (folder / "adapter_model.bin").exists() else ""
        )
        raise UsageError(f"{str(folder)!r} holds no adapter of PEFT; looked for {CONFIG} and {WEIGHTS}{pickled}")
    return AdapterFolder(folder)


def _refuse_unknown(described: Entries, words: PeftWords[Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises UsageError for an entry that may change what the adapter computes, and is not known here."""
    for name, value in described.items():
        if name not in ENTRIES_OF_EVERY_KIND | words.known_entries and value not in (None, False, {}, [], ""):
            raise UsageError(
                f"{name} is {value!r}, which is not known here; accepted: a {words.peft_type} adapter without it"
            )
    bias = described.get("bias") or "none"  # a model without biases has none to train, whatever this says
    if bias != "none" and any(key.endswith(".bias") for key in tensors):
        raise UsageError(f"bias is {bias!r}, and trained biases are not read; accepted: none")


def _as_ours(
    words: PeftWords[Any],
    described: Entries,
    tensors: dict[str, Tensor],
    saved: Layers,
    copies: Copies,
    stacks: tuple[str, ...],
) -> LoadedAdapter:
    """An adapter of PEFT as the method's that these are the words of.

    Arguments:
        tensors: the method's own. saved: those of modules that were trained in full. copies: of the base's own parameters.

    Raises:
        UsageError: as `PeftWords.read`.
    """
    adapter = words.read(described, tensors)
    config = SubspaceConfig(
        method=words.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=tuple(name for name in adapter.layers if name not in stacks) or None,
        target_parameters=stacks,
        modules_to_save=tuple(saved),
        constraint=adapter.constraint,
        constraint_weight=adapter.constraint_weight,
        options=adapter.options,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
    )
    of_method = {file_key(name, suffix): t for name, held in adapter.layers.items() for suffix, t in held.items()}
    in_full = {key: tensor for held in saved.values() for key, tensor in held.items()}
    return LoadedAdapter(
        config,
        {key: tensor.float() for key, tensor in {**of_method, **in_full, **adapter.whole}.items()},
        {name: value for name, value in described.items() if name not in adapter.outdated},
        {name: shape for name, shape in adapter.shapes.items() if name not in stacks},
        adapter.made_from_base,
        copies,
        stacks=stacks,
    )


def rewrite_peft(folder: str | Path, out: str | Path, identify: Callable[[Path], str] | None = None) -> LoadedAdapter:
    """Local: an adapter that PEFT wrote as an adapter folder of ours, from the files alone; what was read is returned.

    Arguments:
        identify: the fingerprint of a model folder, by which a base that is found where PEFT says is found again.

    Raises:
        UsageError: as `read_peft`; an adapter whose start must be made from its base again. StorageError: the disk refuses.
            Nothing half-written is left behind.
    """
    adapter = read_peft(folder)
    if adapter.made_from_base is not None:
        raise UsageError(
            f"{adapter.made_from_base}, and what the adapter starts from is made from its base model; accepted: with the base "
            "model (--base-model)"
        )
    if adapter.stacks:
        raise UsageError(
            f"target_parameters is {list(adapter.config.target_parameters)!r}, and how these are laid out is told by the base "
            "model; accepted: with the base model (--base-model)"
        )
    config, shapes = adapter.config, adapter.shapes
    known = {name: list(shape) for name, shape in shapes.items() if None not in shape}
    about = {"layers": list(shapes), "shapes": known, "conv1d": bool(adapter.described.get("fan_in_fan_out"))}
    method = method_class(config.method)
    if issubclass(method, VirtualTokens):
        about["layers"] = [method.attribute]
    about |= {"base_copies": adapter.copies} if adapter.copies else {}
    base = {"task": adapter.task}
    theirs = {key: value for key, value in adapter.described.items() if key != "peft_version"}
    theirs["base_model_name_or_path"] = base_name(theirs.get("base_model_name_or_path"))
    described = {**theirs, OWN: {"format": FORMAT, **about, "base": base, **config.as_dict()}}
    identify_base(described, adapter.described.get("base_model_name_or_path"), identify)
    tokenizer = Path(folder) if has_tokenizer(Path(folder)) else None
    with whole_folder(Path(out)) as hidden:
        write_adapter(hidden, adapter.tensors, described, tokenizer)
        (hidden / "README.md").write_text(model_card(described, {}))
    return adapter
