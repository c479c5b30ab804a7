"""Adapters that PEFT wrote, read as ours: a configuration of one of our methods, and tensors by the names of our own files.

Everything is checked from the two files before a model is touched. What a field would change that is not known here is refused by
the field's name: an adapter that is read must compute what PEFT computes from it. Local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.atomic_files import whole_folder
from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.families.heads import ANSWERS, CLASSIFIERS
from dist_subspace.interchange.adapter import CONFIG, WEIGHTS, check_finite, write_adapter
from dist_subspace.interchange.base_copies import split_copies
from dist_subspace.interchange.base_model import base_name, identify_base
from dist_subspace.interchange.description import FORMAT, OWN, read_description
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.peft.files import Imported, split_saved, with_tied
from dist_subspace.interchange.peft.kinds import KINDS
from dist_subspace.interchange.tokenizer_files import has_tokenizer
from dist_subspace.subspace import method_class
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

# Entries of adapter_config.json that change nothing about a finished adapter, or are read below.
READ = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "target_modules",
        "modules_to_save",
        "bias",
        "r",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ),
    *("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("init_r", "target_r", "beta1", "beta2", "orth_reg_weight", "tinit", "tfinal", "deltaT", "total_step"),
    *("feedforward_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
    *("miss_dropout", "mini_r", "init_weights"),
    *("oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    *("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers"),
}
WITHOUT_EFFECT = {
    *(
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ),
    *(
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
    ),
    *("init_ia3_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "prefix_projection", "encoder_reparameterization_type", "encoder_hidden_size"),
    *("encoder_num_layers", "encoder_dropout"),
    *("module_dropout", "eps"),  # of OFT: of no linear layer in PEFT, and of coft alone
}


# What PEFT takes for an entry that a configuration lacks.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"},
    "ADALORA": {"init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "orth_reg_weight": 0.5},
    "VERA": {"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "projection_prng_key": 0, "save_projection": True},
    "MISS": {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"},
    "OFT": {"r": 0, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "bias": "none"},
}
# The heads that PEFT trains in full for a task, whatever modules_to_save says.
HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ANSWERS}


def read_peft(folder: str | Path) -> Imported:
    """An adapter folder that PEFT wrote.

    Raises:
        UsageError: no such folder, no adapter in it, an adapter of a kind or with a field that is not known, tensors that do
            not fit together.
    """
    described, tensors = _read(Path(folder))
    check_finite(Path(folder), tensors)
    kind = described.get("peft_type")
    if kind not in KINDS:
        raise unknown_name("peft_type", kind, KINDS)
    for name, value in described.items():
        if name not in READ | WITHOUT_EFFECT and value not in (None, False, {}, [], ""):
            raise UsageError(f"{name} is {value!r}, which is not known here; accepted: a {kind} adapter without it")
    bias = described.get("bias") or "none"  # a model without biases has none to train, whatever this says
    if bias != "none" and any(key.endswith(".bias") for key in tensors):
        raise UsageError(f"bias is {bias!r}, and trained biases are not read; accepted: none")
    described = DEFAULTS.get(kind, {}) | described
    heads = HEADS.get(str(described.get("task_type")), ())
    tensors, saved = split_saved(tensors, (*(described.get("modules_to_save") or ()), *heads))
    if described.get("ensure_weight_tying"):
        tensors, saved = with_tied(tensors, saved)
    tensors, copies = split_copies(tensors)
    return replace(KINDS[kind](described, tensors, saved), copies=copies)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        pickled = (
            "; its weights are a pickle, which runs code when read" if (folder / "adapter_model.bin").exists() else ""
        )
        raise UsageError(f"{str(folder)!r} holds no adapter of PEFT; looked for {CONFIG} and {WEIGHTS}{pickled}")
    try:
        described = read_description(folder)
        with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{str(folder)!r} holds no whole adapter ({error}); copy it again") from error
    if OWN in described:
        raise UsageError(f"{str(folder)!r} is an adapter of dist_subspace; load_adapter reads it")
    return described, tensors


def rewrite_peft(folder: str | Path, out: str | Path, identify: Callable[[Path], str] | None = None) -> Imported:
    """Local: an adapter that PEFT wrote as an adapter folder of ours, from the files alone; what was read is returned.

    Arguments:
        identify: the fingerprint of a model folder, by which a base that is found where PEFT says is found again.

    Raises:
        UsageError: as `read_peft`; an adapter whose start must be made from its base again. StorageError: the disk refuses.
            Nothing half-written is left behind.
    """
    imported = read_peft(folder)
    if imported.needs_base:
        raise UsageError(
            f"init_lora_weights is {imported.described['init_lora_weights']!r}, and what the adapter starts from is made from "
            "its base model; accepted: with the base model (--base-model)"
        )
    config, shapes = imported.config, imported.shapes
    known = {name: list(shape) for name, shape in shapes.items() if None not in shape}
    about = {"layers": list(shapes), "shapes": known, "conv1d": bool(imported.described.get("fan_in_fan_out"))}
    if EMBEDDINGS in imported.tensors:
        about["layers"] = [method_class(config.method).attribute]  # type: ignore[attr-defined]
    about |= {"base_copies": imported.copies} if imported.copies else {}
    base = {"task": imported.task}
    theirs = {key: value for key, value in imported.described.items() if key != "peft_version"}
    theirs["base_model_name_or_path"] = base_name(theirs.get("base_model_name_or_path"))
    described = {**theirs, OWN: {"format": FORMAT, **about, "base": base, **config.as_dict()}}
    identify_base(described, imported.described.get("base_model_name_or_path"), identify)
    tokenizer = Path(folder) if has_tokenizer(Path(folder)) else None
    with whole_folder(Path(out)) as hidden:
        write_adapter(hidden, imported.tensors, described, tokenizer)
        (hidden / "README.md").write_text(model_card(described, {}))
    return imported
