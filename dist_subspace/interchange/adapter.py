"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's names where PEFT knows the method,
and `dist_subspace.json` beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.atomic_files import make_folder, storage_error, sync
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.base_model import identify_base
from dist_subspace.interchange.description import CONFIG, OWN, WEIGHTS, config_texts
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.tensor_names import FACTOR, file_key
from dist_subspace.interchange.tokenizer_files import has_tokenizer, move_files, write_tokenizer
from dist_subspace.loading.load import source_folder
from dist_subspace.placement.collectives import agreed, on_main, world
from dist_subspace.placement.tensors import gathered, whole_on_main
from dist_subspace.subspace import (
    KeepsFactors,
    TrainedModule,
    attached,
    frozen_in_file,
    named_trainables,
)

READABLE = 0o644  # safetensors gives new files to their owner alone


def adapter_tensors(model: nn.Module, *, factors: bool = True) -> dict[str, Tensor]:
    """Collective where parameters are split: the adapter's tensors by file name, whole, on the CPU; the trained ones on every
    rank, the frozen factors, which may be larger than the model, on rank 0 alone, which writes them.

    Arguments:
        factors: the frozen factors too, without which an adapter is not complete in itself (a checkpoint of a run leaves
            them in the run's folder).
    """
    tensors: dict[str, Tensor] = {}
    with gathered(_held(model)), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, TrainedModule):
                tensors |= _on_cpu(name, module.file_tensors())
    for name, module in model.named_modules() if factors else ():
        if isinstance(module, KeepsFactors) and module.kept_factors:
            tensors |= _factors(name, module)
    return tensors


def whole_adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Local: the same with the frozen factors, of a model whose parameters are whole here."""
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, TrainedModule):
                tensors |= _on_cpu(name, module.file_tensors())
            if isinstance(module, KeepsFactors) and module.kept_factors:
                tensors |= _factors_here(name, module)
    return tensors


def _factors(name: str, part: KeepsFactors) -> dict[str, Tensor]:
    """Collective where parameters are split: one part's frozen factors, on rank 0; nothing on the others."""
    base = {id(p) for p in part.base.parameters()}
    frozen = [p for p in part.parameters() if not p.requires_grad and id(p) not in base]

    return whole_on_main(frozen, f"reading the factors of {name}", lambda: _factors_here(name, part)) or {}


def _factors_here(name: str, part: KeepsFactors) -> dict[str, Tensor]:
    return _on_cpu(name, {f"{FACTOR}{key}": tensor for key, tensor in part.factor_tensors().items()})


def _on_cpu(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {file_key(layer, suffix): t.to("cpu", copy=True).contiguous() for suffix, t in tensors.items()}


def _held(model: nn.Module) -> list[nn.Parameter]:
    """What the trained tensors of an adapter's file are made from, and what it holds beside them."""
    held = list(named_trainables(model).values())
    return held + [p for m in model.modules() for p in frozen_in_file(m).values()]


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_model: str | None = None,
    tokenizer: Any = None,
    identify: Callable[[Path], str] | None = None,
) -> Path:
    """Collective: write the adapter; rank 0 alone writes. Read back and compared before it is called saved.

    Arguments:
        base_model: what the adapter calls its base; unset: what the model was loaded from.
        tokenizer: what is written beside it: a tokenizer, or a folder that holds one. Unset: the base's own files, unless the
            folder has a tokenizer already, or the adapter new tokens, which the base's does not know.
        identify: the fingerprint of a model folder, by which a base that is no hub name's is found again.

    Raises:
        UsageError: for a model without a method. StorageError: the disk refuses, and nothing that was begun is left behind;
            every rank raises.
    """
    attached(model)
    tensors = adapter_tensors(model)
    with agreed("describing the adapter"):
        _refuse_empty(tensors, model)
        described = adapter_config(model, base_model)
        source = base_model or getattr(getattr(model, "config", None), "name_or_path", None)
        if tokenizer is None and not has_tokenizer(Path(folder)):
            tokenizer = base_tokenizer(model)

    def write() -> None:
        identify_base(described, source, identify)
        write_adapter(Path(folder), tensors, described, tokenizer)

    on_main(write)
    return Path(folder)


def base_tokenizer(model: nn.Module) -> Path | None:
    """The folder that the model was loaded from, where it holds a tokenizer that knows every token of the adapter."""
    source = source_folder(model)
    return source if has_tokenizer(source) and not attached(model).config.new_tokens else None


def complete_adapter(checkpoint: Path, folder: Path, beside: Mapping[str, Any] | None = None) -> None:
    """Local: a checkpoint's adapter as a folder that needs nothing beside it.

    Arguments:
        beside: further entries of its description, which say what whoever uses it should know.
    """
    adapter = AdapterFolder(checkpoint, verify=True)
    run_files = ("factors", "statistics")
    ours = {key: value for key, value in adapter.ours.items() if key not in run_files} | dict(beside or {})
    write_adapter(folder, adapter.all_tensors(), adapter.described | {OWN: ours})


def fill_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a file's tensors into an attached model whose adapter is whole (before an engine splits it).

    Raises:
        UsageError: for a tensor that is missing, of another shape, or of no layer of this model.
    """
    with agreed("reading the adapter"), torch.no_grad():
        left = dict(tensors)
        for name, module in model.named_modules():
            if isinstance(module, TrainedModule):
                like = module.file_tensors()
                module.load_file_tensors({s: _take(left, file_key(name, s), t) for s, t in like.items()})
        if left:
            raise UsageError(f"the adapter holds {next(iter(left))}, which this model has no layer for")
        attached(model).loaded.update(tensors)


def _take(left: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
    if key not in left:
        raise UsageError(f"the adapter lacks {key}; it belongs to another base model or method")
    tensor = left.pop(key)
    if tensor.shape != like.shape:
        raise UsageError(f"the adapter holds {key} as {list(tensor.shape)}, but this model needs {list(like.shape)}")
    return tensor


def write_adapter(folder: Path, tensors: dict[str, Tensor], described: dict[str, Any], tokenizer: Any = None) -> None:
    """Local: every file is on disk under a hidden name before the first is renamed, the weights first and adapter_config.json
    last: a folder with a configuration is a folder with weights, and what was there stays whole until then.

    Arguments:
        tokenizer: one that is written beside it, or a folder that holds one.

    Raises:
        StorageError: the disk refuses. Nothing that was begun is left behind.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    texts = config_texts(described)
    partials, beside = {name: folder / f".{name}" for name in (WEIGHTS, *texts)}, folder / ".tokenizer"
    try:
        make_folder(folder)
        _write_weights(partials[WEIGHTS], tensors)
        for name, text in texts.items():
            partials[name].write_text(text, encoding="utf-8")
        for partial in partials.values():
            sync(partial)
        if tokenizer is not None:
            write_tokenizer(tokenizer, beside)
            for path in beside.rglob("*"):
                sync(path)
            move_files(beside, folder)
        for name, partial in partials.items():
            if name == CONFIG:  # the last: the names before it are on disk
                sync(folder)
            os.replace(partial, folder / name)
        sync(folder)
    except BaseException as error:
        told = storage_error(folder, error) if isinstance(error, OSError | SafetensorError) else error
        shutil.rmtree(beside, ignore_errors=True)
        _clear_away(partials.values(), made)
        if told is error:
            raise
        raise told from error


def _write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(READABLE)
    with safe_open(file, framework="pt", device="cpu") as handle:
        for key, tensor in tensors.items():
            if not torch.equal(handle.get_tensor(key), tensor):
                raise OSError(f"{file} does not read back as it was written ({key})")


def _clear_away(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Files that were begun, and folders that were made for them, the innermost first."""
    for file in files:
        with suppress(OSError):
            file.unlink()
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _refuse_empty(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """An adapter saved without being gathered is a file of empty tensors (docs/failures.md, "An adapter is saved with empty
    tensors"): never written."""
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise RuntimeError(
            f"rank {world().rank} has no whole {empty[0] if empty else 'adapter tensor'} to save; every rank must call "
            f"save_adapter ({type(model).__name__})"
        )
