"""`export_peft`: an adapter as a folder that PEFT and vLLM read, exactly, or not at all unless an approximation is asked for.

    direct    the method is PEFT's own, and its file is PEFT's file
    lora      the update is a product of two thin matrices: PEFT's LoRA with γ = 1 in every layer, whatever its rank
    scaling   each layer scales its input, or its output and bias: PEFT's IA3

vLLM's loader is the yardstick for names and shapes: `base_model.model.<layer>.lora_A.weight (r, d_in)` and
`lora_B.weight (d_out, r)`, nothing else in the file, and one γ for all layers (it reads `r`, `lora_alpha` and `use_rslora`, and
no patterns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.atomic_files import whole_folder
from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.interchange.adapter import adapter_tensors, base_tokenizer
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.description import OWN, STACKS, WEIGHTS, config_texts
from dist_subspace.interchange.for_class import named_for
from dist_subspace.interchange.hub_adapter import adapter_for_ranks
from dist_subspace.interchange.model_card import model_card
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.parts_without_base import parts_without_base
from dist_subspace.interchange.peft.experts import experts_files, is_direct, pair_of
from dist_subspace.interchange.peft.export_report import ExportReport, class_note, reader_notes
from dist_subspace.interchange.peft.forms import Forms, Lora, forms_of, lora_of, pays
from dist_subspace.interchange.peft.trained_in_full import of_no_layer
from dist_subspace.interchange.peft.written_forms import OF_EVERY_KIND, has_one_scale, lora_files, scaling_files
from dist_subspace.interchange.tokenizer_files import tokenizer_of, write_tokenizer
from dist_subspace.placement.collectives import agreed, all_here, on_main, world
from dist_subspace.placement.tensors import whole_on_main
from dist_subspace.subspace import (
    MethodInfo,
    StackedPart,
    SubspaceConfig,
    SubspaceLinear,
    SubspacePart,
    attached,
    method_class,
)
from dist_subspace.subspace.core.peft_words import Entries

FORMS = ("auto", "direct", "lora", "scaling")
MADE = ("lora", "approximate")  # of one LoRA a layer
FOR = ("checkpoint", "trained")
T = TypeVar("T")


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
        model_or_folder: a model with an adapter, or a folder that `save_adapter` wrote, or its name on the Hub (no base model is
            needed then). Its tokenizer goes with it.
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
    if not isinstance(model_or_folder, nn.Module):
        model_or_folder = adapter_for_ranks(model_or_folder)
    with agreed("planning the export"):
        if form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if for_class not in FOR:
            raise unknown_name("for_class", for_class, FOR)
        if approximate_rank is not None and approximate_rank < 1:
            raise UsageError(f"approximate_rank is {approximate_rank!r}; accepted: a whole number of at least 1")
        described: Entries = {}
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


def export_exactly(folder: Path, out: Path) -> ExportReport:
    """Local: an adapter's folder as `export_peft` writes it, on a rank for which no other one waits.

    Raises:
        UsageError: as `export_peft`, a method without an exact form in PEFT among them.
    """
    return _export_folder(folder, _Wish(out, "auto", None, tokenizer=tokenizer_of(folder)))


@dataclass(frozen=True)
class _Wish:
    out: Path
    form: str
    rank: int | None
    for_class: str = "checkpoint"
    tokenizer: Any = None  # which is written beside it, or a folder that holds one


def _export_model(model: nn.Module, described: Entries, wish: _Wish) -> ExportReport:
    """Collective. Each part is looked at before any is made: a refusal has held one layer's pair at a time."""
    info, names = attached(model).info, attached(model).layers
    native = adapter_tensors(model, factors=False)
    parts: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    if STACKS in described[OWN]:
        direct = is_direct(attached(model).config)
        pairs: dict[str, tuple[Tensor, Tensor] | None] = {}
        for layer, part in () if direct else parts.items():
            pairs[layer] = _on_whole(layer, part, _pair)
        return on_main(_write_experts, described, info, native, pairs, wish)
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


def _write_experts(
    described: Entries,
    info: MethodInfo,
    native: dict[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor] | None],
    wish: _Wish,
) -> ExportReport:
    """Local: of an adapter on experts, which PEFT has for LoRA alone."""
    kind = "direct" if is_direct(SubspaceConfig.of_dict(described[OWN])) else "lora"
    if wish.form not in ("auto", kind):
        raise UsageError(f"form is {wish.form!r}, which this adapter on experts does not have; accepted: auto, {kind}")
    if described[OWN].get("own_class"):
        raise UsageError(
            "an adapter on experts of a text model of a larger family cannot be written for PEFT; accepted: merge"
        )
    config, tensors = experts_files(described, info, native, pairs)
    _write(wish, config, tensors, None)
    return ExportReport(
        folder=str(wish.out),
        method=info.name,
        form=kind,
        peft_type=config["peft_type"],
        rank=config["r"],
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        error=None,
        errors={},
        notes=("vLLM reads no target_parameters: this folder is for PEFT",),
    )


def _pair(name: str, part: SubspacePart) -> tuple[Tensor, Tensor] | None:
    return pair_of(part)


def _form_of(name: str, part: SubspacePart, rank: int | None) -> Forms | None:
    return forms_of(name, part, getattr(part, "bias", None) is not None, rank, base=True)


def _on_whole(name: str, part: Any, function: Callable[..., T], *args: Any, base: bool = False) -> T | None:
    """Collective where parameters are split: the function of a part whose parameters are whole, on rank 0.

    Arguments:
        base: whether the base's are gathered too.
    """
    on_matrix = isinstance(part, SubspaceLinear | StackedPart)
    left = {id(p) for p in part.base.parameters()} if on_matrix and not base else set()
    gathered = [p for p in part.parameters() if id(p) not in left]
    return whole_on_main(gathered, f"the form of {name}", lambda: function(name, part, *args))


def _export_folder(folder: Path, wish: _Wish) -> ExportReport:
    """Local: from the files alone."""
    adapter = AdapterFolder(folder, verify=True)
    info, described = method_class(adapter.config.method).info, adapter.described
    native = adapter.tensors(factors=False)
    if STACKS in described[OWN]:
        pairs = {} if is_direct(adapter.config) else {n: pair_of(part) for n, part in parts_without_base(adapter)}
        return _write_experts(described, info, native, pairs, wish)
    forms: dict[str, Forms | None] | None = None
    linear: dict[str, Forms | None] = {}
    if not _is_direct(described, wish.form):
        biased = described["dist_subspace"].get("biased", [])
        linear = {n: forms_of(n, part, n in biased, wish.rank, base=False) for n, part in parts_without_base(adapter)}
        forms = {name: linear.get(name) for name in adapter.layers}
    kind = _choose(forms, described, info, wish)
    loras: dict[str, Lora] = {}
    if kind in MADE:
        rank = wish.rank if kind == "approximate" else None
        loras = {
            name: lora_of(name, part, form, rank)
            for name, part in parts_without_base(adapter)
            if isinstance(part, SubspaceLinear) and (form := linear[name]) is not None
        }
    return _write_form(kind, described, info, native, forms, loras, wish)


def _is_direct(described: Entries, form: str) -> bool:
    """Whether the adapter's own file is what is wanted: PEFT reads it, and so does vLLM, which knows no patterns."""
    if form not in ("auto", "direct") or described["peft_type"] is None:
        return False
    return form == "direct" or described.get("use_dora") or has_one_scale(described)


def _write_form(
    kind: str,
    described: Entries,
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
        entries, tensors = lora_files(pairs, described) if kind in MADE else scaling_files(forms, described)
        tensors |= of_no_layer(native, described["dist_subspace"]["layers"])
        kept = OF_EVERY_KIND
    errors = {n: (lost, size) for n, (_, lost, size) in loras.items()} if kind == "approximate" else {}
    config = {key: value for key, value in described.items() if key in kept} | entries
    other = described["dist_subspace"].get("own_class") if wish.for_class == "checkpoint" else None
    own_class = other if other and other["names"] else None
    if own_class is not None:
        config, tensors = named_for(config, tensors, described["dist_subspace"]["layers"], own_class["names"])
    _write(wish, config, tensors, own_class and own_class["name"])
    return ExportReport(
        folder=str(wish.out),
        method=info.name,
        form=kind,
        peft_type=config["peft_type"],
        rank=config.get("r"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        error=_overall(errors) if errors else None,
        errors={name: (lost / max(size, 1e-30)) ** 0.5 for name, (lost, size) in errors.items()},
        notes=(*class_note(described, own_class), *reader_notes(config)),
        model_class=own_class and own_class["name"],
    )


def _choose(forms: Mapping[str, Forms | None] | None, described: Entries, info: MethodInfo, wish: _Wish) -> str:
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


def _no_form(info: MethodInfo, described: Entries, wish: _Wish, too_large: bool) -> UsageError:
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


def _overall(errors: Mapping[str, tuple[float, float]]) -> float:
    lost, size = map(sum, zip(*errors.values(), strict=True))
    return float((lost / max(size, 1e-30)) ** 0.5)


def _write(wish: _Wish, config: dict[str, Any], tensors: dict[str, Tensor], model_class: str | None) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with whole_folder(wish.out, size) as folder:
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        if wish.tokenizer is not None:
            write_tokenizer(wish.tokenizer, folder)
        (folder / "README.md").write_text(model_card(config, {}, model_class), encoding="utf-8")
        for name, text in config_texts(config).items():
            (folder / name).write_text(text, encoding="utf-8")
