"""`export_peft`: an adapter as a folder that PEFT and vLLM read, exactly, or not at all unless an approximation is asked for.

    direct    the method is PEFT's own, and its file is PEFT's file
    lora      the update is a product of two thin matrices: PEFT's LoRA with γ = 1 in every layer, whatever its rank
    scaling   each layer scales its input, or its output and bias: PEFT's IA3

vLLM's loader is the yardstick for names and shapes: `base_model.model.<layer>.lora_A.weight (r, d_in)` and
`lora_B.weight (d_out, r)`, nothing else in the file, and one γ for all layers (it reads `r`, `lora_alpha` and `use_rslora`, and
no patterns).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.atomic_files import whole_folder
from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.interchange.adapter import (
    WEIGHTS,
    adapter_config,
    adapter_tensors,
    base_tokenizer,
    read_adapter,
    split_factors,
)
from dist_subspace.interchange.description import config_texts
from dist_subspace.interchange.for_class import named_for
from dist_subspace.interchange.hollow import AdapterFolder, hollow_parts
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.peft.forms import Forms, Lora, forms_of, lora_of, pays
from dist_subspace.interchange.tokenizer_files import tokenizer_of, write_tokenizer
from dist_subspace.placement.collectives import agreed, all_here, on_main, world
from dist_subspace.placement.tensors import whole_on_main
from dist_subspace.subspace import MethodInfo, SubspaceLinear, SubspacePart, attached, method_class
from dist_subspace.subspace.core.peft_words import PREFIX

FORMS = ("auto", "direct", "lora", "scaling")
MADE = ("lora", "approximate")  # of one LoRA a layer
FOR = ("checkpoint", "trained")
T = TypeVar("T")
Described = Mapping[str, Any]
Written = tuple[dict[str, Any], dict[str, Tensor]]  # entries of adapter_config.json, and tensors


@dataclass(frozen=True)
class ExportReport:
    """What was written. form: direct, lora, scaling, or approximate; error: of an approximation, `‖ΔW - B A‖ / ‖ΔW‖` (Frobenius)
    over all layers as one; errors: the same by layer; notes: who cannot read it; model_class: whose module names it has, where
    a text model belongs to a larger family."""

    folder: str
    method: str
    form: str
    peft_type: str
    rank: int | None
    parameters: int
    error: float | None
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    model_class: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        words = {"direct": "its own files", "lora": "an exact LoRA", "scaling": "exact scalings"}
        lines = [
            f"{self.folder}: {self.method} as PEFT's {self.peft_type} ({words.get(self.form, 'an approximation')}{rank}), "
            f"{self.parameters:,} numbers"
        ]
        if self.error is not None:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(
                f"relative error of the updates: {self.error:.3e} over all layers, at most {self.errors[worst]:.3e} ({worst})"
            )
        return "\n".join([*lines, *self.notes])


def export_peft(
    model_or_folder: nn.Module | str | Path,
    out: str | Path,
    form: str = "auto",
    *,
    for_class: str = "checkpoint",
    approximate_rank: int | None = None,
    patience: float = 60.0,
    report: Callable[[str], None] | None = print,
) -> ExportReport:
    """Collective: write the adapter as a folder that PEFT reads; rank 0 alone writes.

    Arguments:
        model_or_folder: a model with an adapter, or a folder that `save_adapter` wrote (no base model is needed then). Its
            tokenizer goes with it.
        out: the folder to write, which must not exist or be empty.
        form: `direct`, `lora` or `scaling`, or `auto`: the first of them that is exact.
        for_class: whose module names are written where a text model was loaded from a checkpoint of a larger family (vision and
            language): those of the class that the checkpoint names (`checkpoint`), or of the one that was trained (`trained`).
        approximate_rank: where none is, write a LoRA of this rank, each layer's update cut to its largest singular values; the
            error is measured and reported.
        patience: seconds to wait for ranks that have not called it.
        report: called on rank 0 with the report's text.

    Raises:
        UsageError: a method without an exact form in PEFT, an unknown form, a folder without an adapter, an `out` that holds
            something. StorageError: the disk refuses. Nothing half-written is left behind.
    """
    all_here("export_peft", patience)
    with agreed("planning the export"):
        if form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if for_class not in FOR:
            raise unknown_name("for_class", for_class, FOR)
        if approximate_rank is not None and approximate_rank < 1:
            raise UsageError(f"approximate_rank is {approximate_rank!r}; accepted: a whole number of at least 1")
        described: Described = {}
        if isinstance(model_or_folder, nn.Module):
            beside, described = base_tokenizer(model_or_folder), adapter_config(model_or_folder)
        else:
            beside = tokenizer_of(Path(model_or_folder))
        wish = _Wish(Path(out), form, approximate_rank, for_class, beside)
    if isinstance(model_or_folder, nn.Module):
        made = _export_model(model_or_folder, described, wish)
    else:
        made = on_main(_export_folder, Path(model_or_folder), wish)
    if report is not None and world().is_main:
        report(str(made))
    return made


@dataclass(frozen=True)
class _Wish:
    out: Path
    form: str
    rank: int | None
    for_class: str = "checkpoint"
    tokenizer: Any = None  # which is written beside it, or a folder that holds one


def _export_model(model: nn.Module, described: Described, wish: _Wish) -> ExportReport:
    """Collective. Each part is looked at before any is made: a refusal has held one layer's pair at a time."""
    info, names = attached(model).info, attached(model).layers
    native = adapter_tensors(model, factors=False)
    parts: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    forms: dict[str, Forms | None] | None = None
    if not _is_direct(described, wish.form):
        forms = {name: _on_whole(name, part, _form_of, wish.rank) for name, part in parts.items()}
    kind = on_main(_choose, forms, described, info, wish)
    loras: dict[str, Any] = {}
    if kind in MADE:
        rank = wish.rank if kind == "approximate" else None
        loras = {
            n: _on_whole(n, part, lora_of, (forms or {})[n], rank, base=rank is not None) for n, part in parts.items()
        }
    return on_main(_write_form, kind, described, info, native, forms, loras, wish)


def _form_of(name: str, part: SubspacePart, rank: int | None) -> Forms | None:
    return forms_of(name, part, getattr(part, "bias", None) is not None, rank, base=True)


def _on_whole(name: str, part: Any, function: Callable[..., T], *args: Any, base: bool = False) -> T | None:
    """Collective where parameters are split: the function of a part whose parameters are whole, on rank 0.

    Arguments:
        base: whether the base's are gathered too.
    """
    left = {id(p) for p in part.base.parameters()} if isinstance(part, SubspaceLinear) and not base else set()
    own = [p for p in part.parameters() if id(p) not in left]
    return whole_on_main(own, f"the form of {name}", lambda: function(name, part, *args))


def _export_folder(folder: Path, wish: _Wish) -> ExportReport:
    """Local: from the files alone."""
    config, tensors = read_adapter(folder)
    native = split_factors(tensors)[1]
    del tensors
    adapter = AdapterFolder(folder)
    info, described = method_class(config.method).info, adapter.described
    forms: dict[str, Forms | None] | None = None
    if not _is_direct(described, wish.form):
        biased = described["dist_subspace"].get("biased", [])
        found = {n: forms_of(n, part, n in biased, wish.rank, base=False) for n, part in hollow_parts(adapter)}
        forms = {name: found.get(name) for name in adapter.layers}
    kind = _choose(forms, described, info, wish)
    loras: dict[str, Lora] = {}
    if kind in MADE:
        rank = wish.rank if kind == "approximate" else None
        loras = {n: lora_of(n, part, found[n], rank) for n, part in hollow_parts(adapter)}  # type: ignore[arg-type]
    return _write_form(kind, described, info, native, forms, loras, wish)


def _is_direct(described: Described, form: str) -> bool:
    """Whether the adapter's own file is what is wanted: PEFT reads it, and so does vLLM, which knows no patterns."""
    if form not in ("auto", "direct") or described["peft_type"] is None:
        return False
    return form == "direct" or described.get("use_dora") or _one_scale(described)


def _one_scale(described: Described) -> bool:
    ranks, alphas = described.get("rank_pattern") or {}, described.get("alpha_pattern") or {}

    def scale(rank: float, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)

    if described["peft_type"] != "LORA" or (not ranks and not alphas):
        return True  # of AdaLoRA's files a pattern is no list of ranks; nor need a method have a rank
    r, alpha = float(described["r"]), float(described["lora_alpha"])
    own = {scale(ranks.get(name, r), alphas.get(name, alpha)) for name in {*ranks, *alphas}}
    return all(math.isclose(gamma, scale(r, alpha)) for gamma in own)


def _write_form(
    kind: str,
    described: Described,
    info: MethodInfo,
    native: dict[str, Tensor],
    forms: Mapping[str, Forms | None] | None,
    loras: Mapping[str, Lora],
    wish: _Wish,
) -> ExportReport:
    """Local: write the folder in the form that was chosen."""
    entries: dict[str, Any] = {}
    tensors, kept = native, described.keys() - {"dist_subspace"}
    if forms is not None:
        pairs = {name: pair for name, (pair, _, _) in loras.items()}
        entries, tensors = _lora(pairs, described) if kind in MADE else _scalings(forms, described)
        tensors |= _trained_in_full(native, described["dist_subspace"]["layers"])
        kept = _OF_EVERY_KIND
    errors = {n: (lost, size) for n, (_, lost, size) in loras.items()} if kind == "approximate" else {}
    config = {key: value for key, value in described.items() if key in kept} | entries
    own = described["dist_subspace"].get("own_class") if wish.for_class == "checkpoint" else None
    own = own if own and own["names"] else None
    if own is not None:
        config, tensors = named_for(config, tensors, described["dist_subspace"]["layers"], own["names"])
    _write(wish, config, tensors, own and own["name"])
    return ExportReport(
        folder=str(wish.out),
        method=info.name,
        form=kind,
        peft_type=config["peft_type"],
        rank=config.get("r"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        error=_overall(errors) if errors else None,
        errors={name: (lost / max(size, 1e-30)) ** 0.5 for name, (lost, size) in errors.items()},
        notes=(*_class_note(described, own), *_notes(config)),
        model_class=own and own["name"],
    )


# Entries of adapter_config.json that PEFT reads for every kind of adapter on layers.
_OF_EVERY_KIND = {
    *("base_model_name_or_path", "task_type", "auto_mapping", "inference_mode", "target_modules", "modules_to_save"),
}


def _choose(forms: Mapping[str, Forms | None] | None, described: Described, info: MethodInfo, wish: _Wish) -> str:
    """Local: the first exact form, else the approximation that was asked for."""
    if described["dist_subspace"].get("new_tokens"):
        raise UsageError(
            "the adapter has new tokens, which PEFT's files of a base that does not know them cannot hold; accepted: merge"
        )
    if forms is None:
        return "direct"
    known = [form for form in forms.values() if form is not None]
    whole = bool(known) and len(known) == len(forms)
    exact = whole and all(form.numbers is not None for form in known)
    if exact and (wish.form == "lora" or (wish.form == "auto" and pays(known))):
        return "lora"
    if whole and all(form.scaled for form in known) and wish.form in ("auto", "scaling"):
        return "scaling"
    if wish.rank is None or wish.form != "auto" or not whole:
        raise _no_form(info, described, wish, too_large=exact)
    return "approximate"


def _no_form(info: MethodInfo, described: Described, wish: _Wish, too_large: bool) -> UsageError:
    nonlinear = described["dist_subspace"].get("constraint") == "mpc_n"
    instead = "save_adapter, whose folder load_adapter reads"
    if info.mergeable and not nonlinear:
        instead = "merge, or approximate_rank for a low-rank approximation"
    name = f"method {info.name}{' with constraint mpc_n' if nonlinear else ''}"
    if wish.form != "auto":
        return UsageError(f"form is {wish.form!r}, which {name} does not have here; accepted: auto, or {instead}")
    if too_large:
        why = f"{name} is a LoRA only with more numbers than the weights that it changes"
        return UsageError(f"{why}; accepted: form lora nevertheless, {instead}")
    return UsageError(f"{name} has no exact form in PEFT; accepted: {instead}")


def _lora(pairs: Mapping[str, tuple[Tensor, Tensor]], described: Described) -> Written:
    """LoRA with γ = 1 in every layer: for PEFT by patterns, for vLLM because `lora_alpha / r` is 1 and nothing else is read."""
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    fewer = {name: own for name, own in ranks.items() if own != rank}
    entries = {
        **{"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"},
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": True},
        **{"rank_pattern": fewer, "alpha_pattern": dict(fewer), "fan_in_fan_out": _conv1d(described)},
    }
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    return entries, tensors


def _conv1d(described: Described) -> bool:
    return bool(described["dist_subspace"].get("conv1d"))


def _scalings(found: Mapping[str, Forms | None], described: Described) -> Written:
    forms = {name: form for name, form in found.items() if form is not None}
    inputs = [name for name, form in forms.items() if form.input_scale is not None]
    pattern = ".*" if len(inputs) == len(forms) else "|".join(map(re.escape, inputs))
    entries = {
        **{"peft_type": "IA3", "feedforward_modules": pattern if inputs else [], "init_ia3_weights": True},
        "fan_in_fan_out": _conv1d(described),
    }
    tensors: dict[str, Tensor] = {}
    for name, form in forms.items():
        if form.input_scale is not None:
            tensors[f"{PREFIX}{name}.ia3_l"] = form.input_scale[None, :]
        elif form.output_scale is not None:
            tensors[f"{PREFIX}{name}.ia3_l"] = form.output_scale[:, None]
    return entries, tensors


def _trained_in_full(native: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`: of no layer, and of the model itself."""
    own = tuple(f"{PREFIX}{name}." for name in layers)
    return {key: t for key, t in native.items() if key.startswith(PREFIX) and not key.startswith(own)}


def _overall(errors: Mapping[str, tuple[float, float]]) -> float:
    lost, size = map(sum, zip(*errors.values(), strict=True))
    return float((lost / max(size, 1e-30)) ** 0.5)


def _class_note(described: Described, own: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Which of the classes of a larger family it is for, where there are two."""
    if own is not None:
        return (f"for {own['name']}, the class that the base's config.json names (for_class trained: its text model)",)
    other = described["dist_subspace"].get("own_class")
    return () if other is None else (f"for the text model that was trained, not for the base's own {other['name']}",)


def _notes(config: Described) -> tuple[str, ...]:
    notes = []
    if config["peft_type"] != "LORA":
        notes.append(f"vLLM reads LoRA alone: this folder ({config['peft_type']}) is for PEFT")
    elif config.get("use_dora"):
        notes.append("vLLM does not read DoRA: this folder is for PEFT")
    if config.get("modules_to_save"):
        notes.append("vLLM reads no modules that were trained in full: for it, merge")
    return tuple(notes)


def _write(wish: _Wish, config: dict[str, Any], tensors: dict[str, Tensor], model_class: str | None) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with whole_folder(wish.out, size) as folder:
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        if wish.tokenizer is not None:
            write_tokenizer(wish.tokenizer, folder)
        (folder / "README.md").write_text(model_card(config, {}, model_class), encoding="utf-8")
        for name, text in config_texts(config).items():
            (folder / name).write_text(text, encoding="utf-8")
