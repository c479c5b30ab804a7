"""The public functions that join the axes: storage, placement and subspace meet here, and in the training loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_subspace.atomic_files import whole_folder
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.interchange.adapter import fill_adapter
from dist_subspace.interchange.adapter import save_adapter as write_adapter_folder
from dist_subspace.interchange.adapter_folder import AdapterFolder, read_adapter
from dist_subspace.interchange.hub_adapter import adapter_for_ranks
from dist_subspace.interchange.loaded_adapter import LoadedAdapter
from dist_subspace.interchange.peft.base_copies import check_copies
from dist_subspace.interchange.peft.importing import read_peft
from dist_subspace.interchange.save_pretrained import write_adapters_only
from dist_subspace.interchange.tensor_names import split_factors
from dist_subspace.interchange.tokenizer_files import has_tokenizer
from dist_subspace.loading.experts_internals import adopt_stacks, release_stacks
from dist_subspace.loading.load import load_frozen
from dist_subspace.loading.transformers_internals import forget_quantization
from dist_subspace.notices import say
from dist_subspace.placement.collectives import agreed
from dist_subspace.placement.for_loading import prepare_blocks
from dist_subspace.placement.stepped import after_steps, watch_optimizers
from dist_subspace.placement.tensors import gathered
from dist_subspace.statistics import set_up_statistics
from dist_subspace.storage import adopt_all, left_alone, storage_info
from dist_subspace.subspace import SubspaceConfig, attach_method, attached, attachment, trainable_parameters

FORGOTTEN = 64  # steps of optimizers, of which an engine may make several in one of the training


def attach(
    model: nn.Module,
    config: SubspaceConfig | None = None,
    *,
    cache: str | Path | None = None,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: Collection[str] = (),
) -> nn.Module:
    """Put a subspace method on a transformers model; returns the same model.

    Takes a model of `load_frozen`, or one that transformers loaded itself: plain, with GPT-2's Conv1D, or with a
    `BitsAndBytesConfig` in 4 or 8 bits. Its linear layers become frozen operators (no weight is copied), everything else is
    frozen as it is; so is a layer whose weight the model reads instead of calling it, and what else a default target cannot
    have is left out and said (`dist_subspace` logs it). Call it before `deepspeed.initialize` or the Trainer; nothing is created
    later. Collective where there is a process group.

    Arguments:
        cache: a folder where statistics of the frozen matrices (SVDs) are kept and found again; rank 0 alone uses it.
        factors: statistics by layer name that are known already, the same on every rank.
        progress: called with (layers done, layers in all) while statistics are made.
        only: of the layers that a method's own target names mean, those that an adapter has which was made before; unset: all.

    Raises:
        UsageError (a ValueError): for an unknown method or option, a target that matches nothing, a rank above a layer's
            dimensions, a constraint that the method cannot have.
    """
    adopt_all(model)
    config = config or SubspaceConfig()
    adopt_stacks(model, config.target_parameters)
    release_stacks(model, config.modules_to_save)
    attach_method(model, config, gathered, known=factors or (), apart=left_alone(model), only=only)
    if attached(model).schedule is not None:
        watch_optimizers()  # whose moments the schedule will edit, whatever loop has made them
        after_steps(FORGOTTEN, functools.partial(_remind, weakref.ref(model)))
    set_up_statistics(model, given=factors, cache=cache, progress=progress)
    forget_quantization(model)
    write_adapters_only(model, base_fingerprint)
    prepare_blocks(model)
    return model


def _remind(held: weakref.ref[nn.Module]) -> None:
    """A loop that trains a method with a schedule and never moves it on trains another method."""
    model = held()
    its = None if model is None else attachment(model)
    if model is None or its is None or its.schedule is None or its.schedule.has_advanced:
        return
    collected = its.collector is not None and bool(its.collector.sums)
    if collected or any(p.grad is not None for p in trainable_parameters(model)):
        say(
            f"{FORGOTTEN} steps of an optimizer were made, and the schedule of method {its.info.name} has not advanced; "
            "accepted: dist_subspace.advance(model, step, max_steps) after each step, or dist_subspace.TrainerMixin of a Trainer"
        )


def save_adapter(
    model: nn.Module, folder: str | Path, base_model: str | Path | None = None, *, tokenizer: Any = None
) -> Path:
    """Collective: write the model's adapter as a folder that `load_adapter` reads, and PEFT where it knows the method; rank 0
    alone writes.

    A base that lies in a folder is named by the folder's name; this machine remembers where it lies.

    Arguments:
        base_model: the hub name or folder of the base; unset: what the model was loaded from.
        tokenizer: what is written beside the adapter: a tokenizer, or a folder that holds one; unset: the base's own files,
            unless the folder has a tokenizer already, or the adapter new tokens, which the base's does not know.

    Raises:
        UsageError: for a model without a method. StorageError: the disk refuses, and nothing that was begun is left behind;
            every rank raises.
    """
    return write_adapter_folder(
        model, folder, None if base_model is None else str(base_model), tokenizer, base_fingerprint
    )


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved adapter on a model without one; returns the model, with the adapter's method attached.

    Arguments:
        folder: an adapter's folder, or its name on the Hub (`user/name`).

    Raises:
        UsageError: for a folder without an adapter, or an adapter that does not fit the model.
    """
    folder = adapter_for_ranks(folder)
    with agreed("reading the adapter"):
        adapter = read_adapter(folder)
    return attach_adapter(model, adapter)


def attach_adapter(model: nn.Module, adapter: LoadedAdapter, **attach_options: Any) -> nn.Module:
    """Collective: attach the method of an adapter that was read, and give it the adapter's tensors; the same on every rank.

    Arguments:
        attach_options: of `attach`, beside the configuration.

    Raises:
        UsageError: the adapter does not fit the model, which is untouched then.
    """
    with agreed("comparing the adapter with the model"):
        adapter = adapter.named_by(model).laid_out_for(model)
        adapter.check(model)
    check_copies(model, adapter.copies)
    factors, trained = split_factors(adapter.tensors)
    attach(model, adapter.config, factors=factors, only=adapter.layers, **attach_options)
    fill_adapter(model, trained)
    return model


def load_adapted(
    folder: str | Path | AdapterFolder,
    base_model: str | Path | None = None,
    storage: str | None = None,
    **load_options: Any,
) -> nn.Module:
    """A saved adapter on its base, loaded as it was held in training. Collective where `deepspeed` is given.

    Arguments:
        folder: an adapter that `save_adapter` wrote, or one that is open already.
        base_model: a model folder or hub name; unset: the one that the adapter names, where it is found again.
        storage: of the frozen weights; unset: that of the training.
        load_options: of `load_frozen`, beside those that the adapter knows (`deepspeed`, `attn_implementation`, ...).

    Raises:
        UsageError: as `load_frozen` and `load_adapter`; an adapter whose base model is not found.
    """
    adapter = folder if isinstance(folder, AdapterFolder) else AdapterFolder(folder, verify=True)
    path = base_model or adapter.find_base(base_fingerprint)
    options = base_options(adapter, path, storage) | load_options
    return attach_adapter(load_frozen(path, **options), adapter.whole() if adapter.ours else read_peft(adapter))


def base_options(adapter: AdapterFolder, path: str | Path, storage: str | None = None) -> dict[str, Any]:
    """How `load_frozen` holds the base of an adapter as it was held in training; PEFT's say no storage, and get bf16.

    Arguments:
        path: where the base is; the adapter's own revision is one of the hub name that the adapter gives.
        storage: in the place of the training's.
    """
    base = adapter.ours.get("base") or {}
    if not adapter.ours:
        base = {"task": read_peft(adapter).task}
    named = str(path) == adapter.described.get("base_model_name_or_path") and not Path(path).expanduser().is_dir()
    kind = storage or base.get("storage") or "bf16"
    labels = {name: base[name] for name in ("label2id", "pad_token_id") if base.get(name) is not None}
    if base.get("id2label"):  # JSON's keys are strings
        labels["id2label"] = {int(number): label for number, label in base["id2label"].items()}
        labels["num_labels"] = len(labels["id2label"])
    return {
        "storage": kind,
        "double_quant": bool(base.get("double_quant")),
        "storage_options": base.get("storage_options") if storage in (None, base.get("storage")) else None,
        "head_storage": base.get("head_storage") if storage in (None, base.get("storage")) else None,
        "task": base.get("task") or "causal-lm",
        "dtype": None if storage_info(kind).dtype else base.get("dtype"),
        "revision": adapter.described.get("revision") if named else None,
        **labels,
    }


def import_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that PEFT wrote on a model without one; returns the model, with our method of the same function attached.

    Known are adapters of the methods that docs/reference.md names PEFT for, with ranks and alphas of single layers, PiSSA's and
    OLoRA's starts, and modules that were trained in full. The model is any that `attach` takes; the folder may be a name on the
    Hub (`user/name`).

    Raises:
        UsageError: a folder without such an adapter, a kind or a field of it that is not known, an adapter for another base.
            The model is untouched then.
    """
    folder = adapter_for_ranks(folder)
    with agreed("reading PEFT's adapter"):
        imported = read_peft(folder)
    return attach_adapter(model, imported)


def rewrite_on_base(folder: str | Path, out: str | Path, base_model: str | Path) -> LoadedAdapter:
    """An adapter that PEFT wrote as an adapter folder of ours, read on its base model, which is held in float32.

    Raises:
        UsageError: as `import_peft` and `load_frozen`. StorageError: the disk refuses. Nothing half-written is left behind.
    """
    imported = read_peft(folder)
    model = attach_adapter(load_frozen(base_model, storage="fp32", task=imported.task or "causal-lm"), imported)
    tokenizer = folder if has_tokenizer(Path(folder)) else None
    with whole_folder(Path(out)) as hidden:
        save_adapter(model, hidden, base_model, tokenizer=tokenizer)
    return imported
