"""`load_frozen`: a checkpoint folder becomes a frozen, quantised, sharded model, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.families.classes import AUTO_CLASSES
from dist_subspace.loading.computation_type import unset_type
from dist_subspace.loading.decoded import decoded_index
from dist_subspace.loading.experts_internals import adopt_stacks
from dist_subspace.loading.formats import check_read, quantisation_of, take_quantisation
from dist_subspace.loading.hub import MODEL_FILES, cached, fetch, is_hub_name
from dist_subspace.loading.index import BytesRead, open_checkpoint
from dist_subspace.loading.notices import cast_by_the_engine, held_dense, read_by_every_rank
from dist_subspace.loading.packed_head import head_options
from dist_subspace.loading.positions import Positions, positions_of, short_model
from dist_subspace.loading.stream import Stream
from dist_subspace.loading.transformers_internals import build_skeleton, key_plan
from dist_subspace.loading.twins import compare, twins
from dist_subspace.loading.widths import linear_inputs
from dist_subspace.notices import say
from dist_subspace.pages import give_back_freed, take_large_from_system
from dist_subspace.placement.collectives import agreed, any_rank, once_per_node, refuse_unlike
from dist_subspace.placement.for_loading import (
    join_ranks,
    loading_device,
    outside_zero_init,
    prepare_blocks,
    read_placement,
    splitter_of,
)
from dist_subspace.storage import AT_ONCE, FrozenStack, options_for, storage_info

ADAPTER = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@outside_zero_init()
def load_frozen(
    path: str | Path,
    storage: str = "bf16",
    double_quant: bool = False,
    deepspeed: Mapping[str, Any] | str | Path | None = None,
    task: str = "causal-lm",
    dtype: str | torch.dtype | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    head_storage: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    experts_at_once: int = AT_ONCE,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **config_changes: Any,
) -> nn.Module:
    """A transformers model whose large linear weights are frozen in `storage`; collective where `deepspeed` is given.

    A thread reads the file in the order of the model, and what has been read is quantised and placed at once. The ranks of a
    node read a part each, so that the checkpoint is read once; at ZeRO stage 3 a rank keeps its shard only, and every parameter
    comes back partitioned (`p.ds_tensor`) before `deepspeed.initialize`. What is worth reading about the load (tensors
    that the model has no place for, weights that stay in 16 bits) is a warning of class `Notice`, on rank 0.

    Arguments:
        path: a transformers model folder with safetensors, or a hub name (downloaded once a node).
        storage: how the linear weights of the model are held (`dist_subspace.storage.storages()` lists the ways).
        double_quant: the option of that name of the 4-bit storages: quantise the statistics too.
        deepspeed: a DeepSpeed configuration (a dict, or the path of a JSON; "auto" values are allowed). Needs, or makes,
            the process group.
        task: which head: causal-lm classification masked-lm seq2seq-lm token-classification base.
        dtype: the type of everything else (embeddings, norms, head) and of the computation. Unset: float32 for storage
            fp32, float16 for fp16, bfloat16 otherwise; of a packed storage float32 where a rank computes on a CPU without
            16-bit products.
        storage_options: the storage's own options, as `model.storage_options` of a configuration.
        head_storage: how a language model's head is held; unset: in `dtype`. A head that is the embedding's table is refused.
        revision: branch, tag or commit of a hub name; unset: its main branch.
        experts_at_once: how many matrices of a mixture's experts are dequantised at once, at most.
        device: where the weights go without `deepspeed`; unset: the accelerator, else the CPU.
        seed: of the initial values of a head that the checkpoint lacks.
        progress: called with (bytes of the checkpoint that have been read, bytes in all).
        config_changes: entries of the model's configuration to change (`num_labels=3`).

    Raises:
        UsageError: for what is not accepted, and for a folder that is not a whole model; every rank raises.
    """
    kind = _type(storage, dtype, device, together=deepspeed is not None)
    options = options_for(storage, double_quant, storage_options)
    if isinstance(experts_at_once, bool) or not isinstance(experts_at_once, int) or experts_at_once < 1:
        raise UsageError(f"model.experts_at_once is {experts_at_once!r}; accepted: a whole number of at least 1")
    of_head = head_options(head_storage, storage, double_quant, storage_options, kind)
    head = None if head_storage is None or of_head is None else (head_storage, of_head)
    if task not in AUTO_CLASSES:
        raise unknown_name("model.task", task, AUTO_CLASSES)
    if deepspeed is not None:
        download(path, revision=revision)
    elif not _is_folder(path):
        fetch(_hub_name(path, "model.path"), "model.path", revision=revision)
    together = agreed if deepspeed is not None else _alone
    with together("reading the model's configuration"):
        stage_config = read_placement(deepspeed)
        folder = resolve_folder(path, revision)
        config = model_config(folder, trust_remote_code, **config_changes)
        if not _is_folder(path):
            config.name_or_path = str(path)  # and not this machine's copy: adapters name their base by it
        index, quantisation = open_checkpoint(folder), take_quantisation(config)
        kwargs: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
        kwargs |= {"trust_remote_code": True} if trust_remote_code else {}
        model = _skeleton(task, config, kind, kwargs)
        # A text model of a larger family has a part of the configuration, which names nothing.
        model.config.name_or_path = config.name_or_path
        if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
        index = decoded_index(index, quantisation, model, kind)
        plan = key_plan(model, index)
        pairs = twins(model, plan)
    splitter = splitter_of(stage_config, device)
    if splitter.splits:
        take_large_from_system()  # whole weights come and go with every layer
    compare(pairs, index, splitter, together)
    with together("planning the load"):
        stream = Stream(model, index, plan, storage, options, kind, seed, head)
        _FRESH[model], _READ[model] = stream.fresh_modules(), index.bytes_read
        remember_source(model, folder, revision)
    with together("reading the model's weights"):
        stream.run(splitter, progress)
        if splitter.splits:
            adopt_stacks(model)
    stream.finish()
    for stack in (module for module in model.modules() if isinstance(module, FrozenStack)):
        stack.at_once = experts_at_once
    give_back_freed()
    for sentence in (
        *stream.sources.notes,
        *stream.quantised.notes(set(stream.sources.keys.values())),
        *(read_by_every_rank(stream.read_whole, stream.share_read_whole()) if stage_config is not None else ()),
        *held_dense(model, storage, kind),
        *cast_by_the_engine(model, stage_config, kind),
    ):
        say(sentence)
    if stage_config is not None:
        prepare_blocks(model, splitter)
    return model.eval()


def fresh_modules(model: nn.Module) -> tuple[str, ...]:
    """The modules of a model of `load_frozen` whose parameters its checkpoint lacks: heads and poolers, drawn from the seed."""
    return _FRESH.get(model, ())


def bytes_read(model: nn.Module) -> int:
    """How many bytes of tensors this rank has read for a model of `load_frozen`."""
    return _READ[model].total


def remember_source(model: nn.Module, folder: Path, revision: str | None) -> None:
    """Keep where a model's files lie on this machine, and the revision of a hub name that was asked for."""
    _SOURCE[model] = folder, revision


def source_folder(model: nn.Module) -> Path | None:
    """Where the files lie that a model was read from; None where they are not here."""
    folder = _SOURCE.get(model, (None, None))[0]
    return folder or local_folder(getattr(getattr(model, "config", None), "name_or_path", None))


def source_revision(model: nn.Module) -> str | None:
    """The revision of its hub name that a model was asked for by; None where none was."""
    return _SOURCE.get(model, (None, None))[1]


_SOURCE: WeakKeyDictionary[nn.Module, tuple[Path, str | None]] = WeakKeyDictionary()
_FRESH: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
_READ: WeakKeyDictionary[nn.Module, BytesRead] = WeakKeyDictionary()


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """Without DeepSpeed a load is this process's own affair, whatever others do."""
    yield


def _type(
    storage: str, dtype: str | torch.dtype | None, device: torch.device | str | None, *, together: bool
) -> torch.dtype:
    """Collective where `together`: the type of the computation."""
    given = resolve_dtype(storage, dtype)
    if together:
        join_ranks()
    if dtype is not None:
        return given
    return unset_type(storage, loading_device(device, alone=not together), together=together)


def resolve_dtype(storage: str, dtype: str | torch.dtype | None) -> torch.dtype:
    """The type of the computation; a float storage that contradicts it is refused."""
    of_storage = storage_info(storage).dtype
    if dtype is None:
        return of_storage or torch.bfloat16
    wanted = DTYPES.get(str(dtype).removeprefix("torch."))
    if wanted is None:
        raise unknown_name("model.dtype", dtype, DTYPES)
    if of_storage is not None and wanted != of_storage:
        raise UsageError(
            f"model.dtype is {_named(wanted)!r}, which contradicts model.storage {storage!r}; accepted with it: "
            f"{_named(of_storage)}, null"
        )
    return wanted


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_folder(path: str | Path, revision: str | None = None, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """A local folder, or the local copy of a hub name, which `download` brings up to date first, once a node: whole as far as
    these files go.

    Raises:
        UsageError: neither, a folder that cannot be read, or one that is given a revision.
    """
    if _is_folder(path):
        check_revision(path, revision)
        local = Path(path).expanduser()
        try:
            os.listdir(local)
        except OSError as error:
            raise UsageError(f"model.path is {str(path)!r}, which cannot be read here ({error.strerror})") from error
        return local
    name = _hub_name(path, "model.path")
    return cached(name, files, revision) or fetch(name, "model.path", files, revision)


def check_revision(path: str | Path, revision: str | None) -> None:
    """Raises UsageError for a revision of a folder."""
    if revision is not None and _is_folder(path):
        raise UsageError(
            f"model.revision is {revision!r}, but model.path is {str(path)!r}, a folder, which has no revisions; accepted with a "
            "folder: null"
        )


def _is_folder(path: str | Path) -> bool:
    """Whether there is such a folder here, or what this user may not look into."""
    try:
        return Path(path).expanduser().is_dir()
    except PermissionError:
        return True


def local_folder(name: str | Path | None, revision: str | None = None) -> Path | None:
    """Where a model's files lie on this machine, for a folder or a hub name that was fetched before; else None."""
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return cached(str(name), revision=revision) if is_hub_name(str(name)) else None


def download(
    path: str | Path, field: str = "model.path", files: tuple[str, ...] = MODEL_FILES, revision: str | None = None
) -> None:
    """Collective: fetch a hub name once a node, before every rank reads it. One node may have a folder of that name.

    Raises:
        UsageError: the hub does not give it to a node, or gives two nodes different commits of it.
    """
    is_here = _is_folder(path)
    if not any_rank(not is_here and is_hub_name(str(path))):
        return
    commits: dict[str, str] = {}

    def fetch_missing() -> None:
        if not is_here:
            commits[f"commit of {path}"] = fetch(_hub_name(path, field), field, files, revision).name

    once_per_node(fetch_missing)
    refuse_unlike(commits)


def _hub_name(path: str | Path, field: str) -> str:
    if not is_hub_name(str(path)):
        raise UsageError(
            f"{field} is {str(path)!r}, which is no folder; accepted: a transformers model folder or a hub name"
        )
    return str(path)


def model_config(folder: Path, trust_remote_code: bool = False, **changes: Any) -> transformers.PretrainedConfig:
    """The configuration of a local model folder, with changes.

    Raises:
        UsageError: for a folder without one, one that transformers does not understand, or weights in a format that is not read.
    """
    if (folder / ADAPTER).exists():
        raise UsageError(
            f"model.path is {str(folder)!r}, which holds an adapter ({ADAPTER}): transformers would put it on its base model, "
            "and here a model.path is a base model alone; give the base model, and the adapter to load_adapter, import_peft or "
            "subspace.init_from; where the weights in the folder are a whole model that is meant without it, remove that file"
        )
    if not (folder / "config.json").exists():
        raise UsageError(f"model.path is {str(folder)!r}, which is no model folder: it has no config.json")
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, return_unused_kwargs=True, **changes
        )
    except Exception as error:  # whatever an entry of another type or value leads to
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UsageError(
                f"model.path is {str(folder)!r}, a model with Python code of its own; accepted: model.trust_remote_code true, "
                "once you have read that code, which is run then"
            ) from error
        raise UsageError(
            f"{folder / 'config.json'} is not understood by transformers {transformers.__version__}: {_in_a_line(error)}"
        ) from error
    if unused:  # transformers drops them without a word
        name = next(iter(unused))
        raise UsageError(
            f"{name} is no argument of load_frozen and no entry of a {config.model_type} configuration; accepted: the arguments "
            "of load_frozen, and entries of the model's config.json"
        )
    quantisation = quantisation_of(config)
    if quantisation is not None:
        check_read(folder, quantisation)
    return config


def model_positions(folder: Path, task: str, wanted: int, trust_remote_code: bool = False) -> Positions:
    """How long a row of a local model may be, and where its positions begin; no weight is read.

    `wanted`: tokens of the longest row that is needed.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    config = model_config(folder, trust_remote_code)
    return positions_of(lambda changed: _skeleton(task, changed, torch.float32, kwargs), config, wanted)


def model_widths(folder: Path, task: str, trust_remote_code: bool = False) -> dict[str, int]:
    """How many inputs each linear layer of a local model has, by name (`linear_inputs`), of one block of it where the family lets
    itself be shortened; no weight is read."""
    kwargs: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    config = model_config(folder, trust_remote_code)
    return linear_inputs(short_model(lambda changed: _skeleton(task, changed, torch.float32, kwargs), config))


def _skeleton(
    task: str, config: transformers.PretrainedConfig, dtype: torch.dtype, kwargs: dict[str, Any]
) -> transformers.PreTrainedModel:
    try:
        return build_skeleton(getattr(transformers, AUTO_CLASSES[task]), config, dtype, **kwargs)
    except Exception as error:  # whatever a family's own code makes of a value that it does not know
        raise UsageError(
            f"a {config.model_type} model cannot be made for model.task {task!r}: {_in_a_line(error)}"
        ) from error


def _in_a_line(error: Exception) -> str:
    """What transformers says, without what it adds line by line; a KeyError says its key alone."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else ""
    return said if isinstance(error, (ValueError, ImportError, OSError)) and said else f"{type(error).__name__} {said}"
