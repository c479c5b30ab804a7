"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's names where PEFT knows the method."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.atomic_files import storage_error, sync
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import agreed, on_main, world
from dist_subspace.placement.wholes import on_wholes
from dist_subspace.placement.zero import gathered
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import (
    Attachment,
    NewTokens,
    Settings,
    SubspaceConfig,
    SubspaceLinear,
    SubspacePart,
    TrainedCopy,
    attached,
    named_trainables,
)
from dist_subspace.subspace.targets import ends_with
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = "factor."  # before a frozen factor's own name
FORMAT = 1
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
            if isinstance(module, SubspacePart | TrainedCopy | NewTokens):
                tensors |= _on_cpu(name, module.file_tensors())
    for name, module in model.named_modules() if factors else ():
        if isinstance(module, SubspacePart) and module.kept_factors:
            tensors |= _factors(name, module)
    return tensors


def _factors(name: str, part: SubspacePart) -> dict[str, Tensor]:
    """Collective where parameters are split: one part's frozen factors, on rank 0; nothing on the others."""
    base = {id(p) for p in part.base.parameters()} if isinstance(part, SubspaceLinear) else set()
    frozen = [p for p in part.parameters() if not p.requires_grad and id(p) not in base]

    def read() -> dict[str, Tensor]:
        return _on_cpu(name, {f"{FACTOR}{key}": tensor for key, tensor in part.factor_tensors().items()})

    return on_wholes(frozen, f"reading the factors of {name}", read) or {}


def _on_cpu(layer: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {file_key(layer, suffix): t.to("cpu", copy=True).contiguous() for suffix, t in found.items()}


def file_key(layer: str, suffix: str) -> str:
    """A tensor's name in the file; a suffix that begins as PEFT's names do is a name of the whole model already."""
    return suffix if suffix.startswith("base_model.") or suffix == EMBEDDINGS else f"{PREFIX}{layer}.{suffix}"


def _held(model: nn.Module) -> list[nn.Parameter]:
    """What the trained tensors of an adapter's file are made from, and what it holds beside them."""
    held = list(named_trainables(model).values())
    return held + [p for m in model.modules() if isinstance(m, SubspacePart) for p in m.beside().values()]


def split_factors(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A file's tensors as frozen factors by layer name, and the trained rest."""
    factors: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, mark, name = key.removeprefix(PREFIX).rpartition(f".{FACTOR}")
        if mark:
            factors.setdefault(layer, {})[name] = tensor
        else:
            trained[key] = tensor
    return factors, trained


def adapter_config(model: nn.Module, base_model: str | None = None) -> dict[str, Any]:
    """The adapter's description. Keys that PEFT reads have PEFT's names and meaning; ours are under `dist_subspace`."""
    attachment = attached(model)
    resolved, config = attachment.resolved, attachment.config
    parts = {name: model.get_submodule(name) for name in attachment.layers}
    settings = _usual(attachment, parts)
    ours = config.as_dict() | {"options": resolved.method.file_options(config.options)}
    ours |= {"rank": settings.rank or None, "alpha": resolved.settings.alpha or None}
    ours |= {"alpha_pattern": _own_alphas(parts, resolved.settings.alpha) | dict(config.alpha_pattern)}
    path = base_model or getattr(getattr(model, "config", None), "_name_or_path", None)
    described: dict[str, Any] = {
        "peft_type": _peft_type(model),
        "base_model_name_or_path": str(path) if path else None,
        "task_type": _task_type(model, attachment.saved_modules),
        "inference_mode": True,
        "target_modules": _endings(model, attachment.layers),
        "modules_to_save": list(attachment.saved_modules) or None,
    }
    if described["peft_type"]:
        described |= resolved.method.peft_config(settings)
        described |= {"fan_in_fan_out": _transposed(parts), **_patterns(parts, described)}
        described |= parts[attachment.layers[0]].peft_shape()  # type: ignore[operator]
    # Of tokens that stand beside the model; PEFT's files of them know no layers.
    if described["target_modules"] is None:
        described = {key: value for key, value in described.items() if key not in ("target_modules", "fan_in_fan_out")}
    shapes = {name: shape for name, part in parts.items() if (shape := _shape(part))}
    biased = [name for name in shapes if parts[name].bias is not None]
    about = {
        "layers": list(parts),
        "shapes": shapes,
        "biased": biased,
        "conv1d": _transposed(parts),
        "base": _base(model),
    }
    return described | {"dist_subspace": {"format": FORMAT, **about, **ours}}


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None) -> Path:
    """Collective: write the adapter; rank 0 alone writes. Read back and compared before it is called saved (row 4).

    Raises:
        UsageError: for a model without a method. StorageError: the disk refuses, and nothing that was begun is left behind;
            every rank raises.
    """
    attached(model)
    tensors = adapter_tensors(model)
    _refuse_empty(tensors, model)
    described = adapter_config(model, base_model)
    on_main(write_adapter, Path(folder), tensors, described)
    return Path(folder)


def read_adapter(folder: str | Path) -> tuple[SubspaceConfig, dict[str, Tensor]]:
    """What a folder that `save_adapter` wrote holds.

    Raises:
        UsageError: no such folder, no adapter in it, an adapter of an unknown format, or a file that is cut short.
    """
    path = Path(folder)
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UsageError(f"{str(folder)!r} holds no adapter; looked for {CONFIG} and {WEIGHTS}")
    try:
        described = json.loads((path / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path / CONFIG} is not JSON at line {error.lineno}: {error.msg}") from error
    ours = described.get("dist_subspace") if isinstance(described, dict) else None
    if not isinstance(ours, dict):
        kind = described.get("peft_type") if isinstance(described, dict) else None
        raise UsageError(f"{path / CONFIG} was not written by dist_subspace (peft_type {kind!r})")
    check_format(path, ours)
    fields = SubspaceConfig.__dataclass_fields__
    config = SubspaceConfig(**{key: value for key, value in ours.items() if key in fields})
    try:
        with safe_open(path / WEIGHTS, framework="pt", device="cpu") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        return config, tensors | _factors_beside(path, ours.get("factors") or {})
    except SafetensorError as error:
        raise UsageError(f"{path / WEIGHTS} is no whole safetensors file ({error}); copy it again") from error


def check_format(folder: Path, ours: Mapping[str, Any]) -> None:
    """Raises UsageError for an adapter that another version of this package has written otherwise."""
    if ours.get("format") != FORMAT:
        raise UsageError(
            f"{folder / CONFIG} is of format {ours.get('format')!r}; this version reads format {FORMAT}: read it with the "
            "version that wrote it"
        )


def _factors_beside(folder: Path, kept: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """The frozen factors that a run's checkpoint names: they lie once in the run's folder."""
    tensors: dict[str, Tensor] = {}
    for layer, entry in kept.items():
        file = factor_file(folder, entry)
        if not file.exists():
            raise UsageError(f"{str(folder)!r} is a checkpoint whose factors are in {file}, and there is no such file")
        with safe_open(file, framework="pt", device="cpu") as handle:
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        tensors |= {f"{PREFIX}{layer}.{FACTOR}{name}": tensor for name, tensor in found.items()}
    return tensors


def factor_file(folder: Path, entry: Mapping[str, str]) -> Path:
    """Where a checkpoint's factors lie: beside it, or beside the folder that it was set aside in."""
    near, far = (home / "factors" / entry["file"] for home in folder.resolve().parents[:2])
    return far if far.exists() and not near.exists() else near


def complete_adapter(checkpoint: Path, folder: Path) -> None:
    """Local: a checkpoint's adapter as a folder that needs nothing beside it."""
    described = json.loads((checkpoint / CONFIG).read_text())
    _, tensors = read_adapter(checkpoint)
    described["dist_subspace"].pop("factors", None)
    write_adapter(folder, tensors, described)


def fill_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a file's tensors into an attached model whose adapter is whole (before an engine splits it).

    Raises:
        UsageError: for a tensor that is missing, of another shape, or of no layer of this model.
    """
    with agreed("reading the adapter"), torch.no_grad():
        left = dict(tensors)
        for name, module in model.named_modules():
            if isinstance(module, SubspacePart):
                own = {s: _take(left, file_key(name, s), t) for s, t in module.file_tensors().items()}
                module.load_file_tensors(own)
            elif isinstance(module, (TrainedCopy, NewTokens)):
                module.load_file_tensors(
                    {s: _take(left, file_key(name, s), t) for s, t in module.file_tensors().items()}
                )
        if left:
            raise UsageError(f"the adapter holds {next(iter(left))}, which this model has no layer for")


def _take(left: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
    if key not in left:
        raise UsageError(f"the adapter lacks {key}; it belongs to another base model or method")
    tensor = left.pop(key)
    if tensor.shape != like.shape:
        raise UsageError(f"the adapter holds {key} as {list(tensor.shape)}, but this model needs {list(like.shape)}")
    return tensor


def write_adapter(folder: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Local: both files are on disk under hidden names before the first is renamed, the weights first: a folder with a
    configuration is a folder with weights, and what was there stays whole until then.

    Raises:
        StorageError: the disk refuses. Nothing that was begun is left behind.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    partials = {name: folder / f".{name}" for name in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(partials[WEIGHTS], tensors)
        partials[CONFIG].write_text(json.dumps(described, indent=2) + "\n")
        for partial in partials.values():
            sync(partial)
        for name, partial in partials.items():
            os.replace(partial, folder / name)
    except BaseException as error:
        told = storage_error(folder, error) if isinstance(error, OSError | SafetensorError) else error
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
    """An adapter saved without being gathered is a file of empty tensors (pains.md row 4): never written."""
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise RuntimeError(
            f"rank {world().rank} has no whole {empty[0] if empty else 'adapter tensor'} to save; every rank must call "
            f"save_adapter ({type(model).__name__})"
        )


def _endings(model: nn.Module, layers: tuple[str, ...]) -> list[str]:
    """Target names for PEFT: the shortest endings if they mean the same layers, else the whole names."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    also = {name for name in linear if name.rpartition(".")[2] in endings and not name.endswith(".base")}
    return endings if also == set(layers) else sorted(layers)


def _shape(part: nn.Module) -> list[int] | None:
    """`[d_out, d_in]` of a linear layer: with it, what an adapter does to the layer can be told without the base model."""
    return [part.out_features, part.in_features] if isinstance(part, SubspaceLinear) else None


def _usual(attachment: Attachment, parts: Mapping[str, nn.Module]) -> Settings:
    """The settings that a layer has, unless a pattern names it."""
    named = [*attachment.config.rank_pattern, *attachment.config.alpha_pattern]
    usual = [name for name in parts if not any(ends_with(name, ending) for ending in named)]
    return parts[usual[0] if usual else attachment.layers[0]].settings  # type: ignore[return-value]


def _patterns(parts: Mapping[str, nn.Module], described: Mapping[str, Any]) -> dict[str, Any]:
    """Layers whose rank or alpha differ from the rest, by whole name, as PEFT's LoRA has them."""
    if described["peft_type"] != "LORA":
        return {}
    settings: dict[str, Settings] = {name: part.settings for name, part in parts.items()}  # type: ignore[misc]
    ranks = {name: own.rank for name, own in settings.items() if own.rank != described["r"]}
    alphas = {name: own.alpha for name, own in settings.items() if own.alpha != described["lora_alpha"]}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _own_alphas(parts: Mapping[str, nn.Module], usual: float) -> dict[str, float]:
    """Layers whose alpha is another than the file's: one that was not given follows a layer's own rank."""
    settings = {name: part.settings for name, part in parts.items() if isinstance(part, SubspaceLinear)}
    return {name: own.alpha for name, own in settings.items() if usual and own.alpha != usual}


def _base(model: nn.Module) -> dict[str, Any]:
    """How the base was held while the adapter was trained beside it: what a merge of the folder alone loads again."""
    operators = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    held = next((m for m in operators if not m.is_float), operators[0] if operators else None)
    task = next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), "base")
    return {
        "storage": getattr(held, "storage", None),
        "double_quant": bool(getattr(held, "double_quant", False)),
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


_TASKS = {
    **{"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForMaskedLM": "masked-lm"},
    **{"ForSequenceClassification": "classification", "ForTokenClassification": "token-classification"},
    "ForConditionalGeneration": "seq2seq-lm",
}


def _peft_type(model: nn.Module) -> str | None:
    """PEFT's name of the method, where PEFT would compute the same from these files."""
    attachment = attached(model)
    kind, parts = attachment.info.peft_type, [model.get_submodule(name) for name in attachment.layers]
    agrees = all(part.agrees_with_peft() for part in parts)  # type: ignore[operator]
    alike = kind == "LORA" or all(part.settings == parts[0].settings for part in parts)  # which alone has patterns
    return kind if agrees and alike and not attachment.config.new_tokens else None


def _transposed(parts: Mapping[str, nn.Module]) -> bool:
    """Whether the base model's own layers are Conv1D, which PEFT calls `fan_in_fan_out`."""
    return any(getattr(part.base, "conv1d", False) for part in parts.values() if isinstance(part, SubspaceLinear))


def _task_type(model: nn.Module, saved_modules: tuple[str, ...]) -> str | None:
    """PEFT's task. For classification PEFT expects a trained head in the file, so without one it is told no task."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    if saved_modules:
        kinds |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for ending, task in kinds.items() if type(model).__name__.endswith(ending)), None)
