"""The kinds of adapters that PEFT writes and we read, each as one of our methods. Local; all from the files alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.interchange.peft.files import Imported, Layers, Shapes, by_layer, flat
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

# Values of init_lora_weights that leave the base as it is.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")

Described = Mapping[str, Any]
T = TypeVar("T")
Kind = Callable[[Described, dict[str, Tensor], Layers], Imported]


# LoRA, and what is LoRA with a field.


def _lora(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    suffixes = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"}
    if described.get("use_dora"):
        suffixes |= dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "lora_magnitude_vector")
    layers = by_layer(tensors, suffixes, "LORA")
    method, options = _lora_method(described)
    ranks = {name: held["lora_A.weight"].shape[0] for name, held in layers.items()}
    expected, alphas = _patterns(described, ranks)
    for name, rank in ranks.items():
        if rank != expected[name]:
            raise UsageError(
                f"the adapter holds rank {rank} for {name}, but its configuration says {expected[name]}; it is damaged"
            )
    if described.get("use_rslora") and method != "rslora":  # γ = α / √r, said by an α whose γ is α / r
        alphas = {name: alpha * math.sqrt(ranks[name]) for name, alpha in alphas.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    config = SubspaceConfig(
        method=method,
        rank=rank,
        alpha=float(alpha),
        dropout=float(described.get("lora_dropout") or 0.0),
        target_modules=tuple(layers),
        modules_to_save=tuple(saved),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: float(own) for name, own in alphas.items() if own != alpha},
        options=options,
    )
    for held in layers.values():
        if "lora_magnitude_vector" in held:
            held["lora_magnitude_vector"] = held["lora_magnitude_vector"].flatten()
    shapes = {n: (held["lora_B.weight"].shape[0], held["lora_A.weight"].shape[1]) for n, held in layers.items()}
    return Imported(config, flat(layers, saved), described, shapes, method in ("pissa", "olora"))  # type: ignore[arg-type]


def _usual(values: Mapping[str, T]) -> T:
    return Counter(values.values()).most_common(1)[0][0]


def _lora_method(described: Described) -> tuple[str, dict[str, Any]]:
    start = described.get("init_lora_weights", True)
    plain = "dora" if described.get("use_dora") else "rslora" if described.get("use_rslora") else "lora"
    if start in PLAIN_STARTS:
        return plain, {}
    if str(start).startswith("pissa_niter_"):
        raise UsageError(
            f"init_lora_weights is {start!r}, a start that PEFT draws at random and does not save, so that nobody can make it "
            "again, PEFT neither; accepted: pissa, or the adapter saved from its training as a plain LoRA (PEFT: "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    residual = start if start in ("pissa", "olora") else None
    if residual is None or described.get("use_dora"):
        accepted = ", ".join(str(value) for value in (*PLAIN_STARTS, "pissa", "olora"))
        raise UsageError(
            f"init_lora_weights is {start!r}{' with use_dora' if residual else ''}, whose base is not the base model alone; "
            f"accepted: {accepted}"
        )
    return residual, {"svd": "exact"} if residual == "pissa" else {}


def _patterns(described: Described, names: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Each layer's rank and alpha, by PEFT's patterns: the first key that the whole of a name, or its end, matches. A key that
    matches none means nothing, as in PEFT."""
    layers = list(names)

    def resolved(what: str, usual: Any) -> dict[str, Any]:
        pattern = described.get(what) or {}
        found = {n: pattern_key(pattern, n) for n in layers}
        return {name: usual if key is None else pattern[key] for name, key in found.items()}

    return resolved("rank_pattern", described["r"]), resolved("alpha_pattern", described["lora_alpha"])


def pattern_key(pattern: Iterable[str], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` that the whole of a name, or its end, matches."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


# The others.


def _adalora(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    """Layers that the budget has shortened are filled up with triplets of zeros, at their old places."""
    layers = by_layer(tensors, {n: n for n in ("lora_A", "lora_B", "lora_E")}, "ADALORA")
    rows, weight = int(described["init_r"]), float(described.get("orth_reg_weight") or 0.0)
    masks = {re.sub(r"\.lora_E(\..*)?$", "", key): mask for key, mask in (described.get("rank_pattern") or {}).items()}
    shapes = {n: (held["lora_B"].shape[0], held["lora_A"].shape[1]) for n, held in layers.items()}
    for key in masks:
        if key not in layers:
            raise UsageError(f"rank_pattern has {key!r}, which names no layer of the adapter")
    full = {name: _filled_up(name, held, rows, masks.get(name)) for name, held in layers.items()}
    config = SubspaceConfig(
        method="adalora",
        rank=min(int(described.get("target_r") or rows), rows),
        alpha=float(described["lora_alpha"]),
        dropout=float(described.get("lora_dropout") or 0.0),
        target_modules=tuple(layers),
        modules_to_save=tuple(saved),
        constraint=None if weight > 0 else "none",
        constraint_weight=weight or 0.1,
        options={"init_rank": rows},
    )
    whole = {key: value for key, value in described.items() if key != "rank_pattern"}  # it is of the shortened tensors
    return Imported(config, flat(full, saved), whole, shapes)  # type: ignore[arg-type]


def _filled_up(name: str, held: Mapping[str, Tensor], rows: int, mask: list[bool] | None) -> dict[str, Tensor]:
    own = held["lora_A"].shape[0]
    places = torch.arange(own) if mask is None else torch.tensor(mask).nonzero().flatten()
    if own == rows:
        return dict(held)
    if len(places) != own or own > rows:
        raise UsageError(
            f"the adapter holds rank {own} for {name}, which its configuration does not say; it is damaged"
        )
    a, b, e = (held[key] for key in ("lora_A", "lora_B", "lora_E"))
    full = {
        "lora_A": a.new_zeros(rows, a.shape[1]),
        "lora_B": b.new_zeros(b.shape[0], rows),
        "lora_E": e.new_zeros(rows, 1),
    }
    full["lora_A"][places], full["lora_B"][:, places], full["lora_E"][places] = a, b, e
    return full


def _ia3(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    layers = by_layer(tensors, {"ia3_l": "ia3_l"}, "IA3")
    feedforward = described.get("feedforward_modules")
    inputs = [name for name, held in layers.items() if _scales_input(name, held["ia3_l"], feedforward)]
    shapes: Shapes = {}
    for name, held in layers.items():
        size = held["ia3_l"].numel()
        if held["ia3_l"].shape != ((1, size) if name in inputs else (size, 1)):
            raise UsageError(
                f"the adapter holds {name}.ia3_l as {list(held['ia3_l'].shape)}, which feedforward_modules contradicts"
            )
        shapes[name] = (None, size) if name in inputs else (size, None)
    options = {"scale_bias": True, "input_scaled_modules": inputs}
    config = SubspaceConfig(method="ia3", target_modules=tuple(layers), modules_to_save=tuple(saved), options=options)
    return Imported(config, flat(layers, saved), described, shapes)


def _scales_input(name: str, scales: Tensor, feedforward: str | Iterable[str] | None) -> bool:
    """As PEFT decides it: a whole pattern, or any text that the name ends in; without either PEFT knows the family, and the
    tensor's shape says the same."""
    if feedforward is None:
        return scales.shape[0] == 1
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    return name.endswith(tuple(feedforward))


def _vera(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    shared = {key: tensors.pop(key) for key in ("base_model.vera_A", "base_model.vera_B") if key in tensors}
    layers = by_layer(tensors, {n: n for n in ("vera_lambda_b", "vera_lambda_d")}, "VERA")
    if bool(described.get("save_projection", True)) != (len(shared) == 2):
        raise UsageError("save_projection does not say whether the adapter holds its projections; it is damaged")
    options = {
        "d_init": float(described.get("d_initial", 0.1)),
        "projection_seed": int(described.get("projection_prng_key") or 0),
        "save_projection": len(shared) == 2,
    }
    config = SubspaceConfig(
        method="vera",
        rank=int(described["r"]),
        dropout=float(described.get("vera_dropout") or 0.0),
        target_modules=tuple(layers),
        modules_to_save=tuple(saved),
        options=options,
    )
    shapes: Shapes = {name: (held["vera_lambda_b"].shape[0], None) for name, held in layers.items()}
    return Imported(config, flat(layers, saved) | {key: t.float() for key, t in shared.items()}, described, shapes)


def _miss(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    layers = by_layer(tensors, {"miss_block": "miss_block"}, "MISS")
    variant, rank = described.get("init_weights", True), int(described["r"])
    if variant == "bat":
        raise UsageError(
            "init_weights is 'bat', whose update is made of blocks of the frozen matrix itself, so that it is no product with "
            "it; accepted: True, mini"
        )
    columns = int(described["mini_r"]) if variant == "mini" else None
    for name, held in layers.items():
        own = tuple(held["miss_block"].shape)
        if own[0] != rank or own[1] != (columns or own[1]):
            raise UsageError(
                f"the adapter holds {name}.miss_block as {list(own)}, which its configuration contradicts; it is damaged"
            )
    config = SubspaceConfig(
        method="miss",
        rank=rank,
        dropout=float(described.get("miss_dropout") or 0.0),
        target_modules=tuple(layers),
        modules_to_save=tuple(saved),
        options={"mini_r": columns},
    )
    shapes: Shapes = {n: (None if columns else held["miss_block"].shape[1], None) for n, held in layers.items()}
    return Imported(config, flat(layers, saved), described, shapes)


def _oft(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
    layers = by_layer(tensors, {"oft_R.weight": "oft_R.weight"}, "OFT")
    if "oft_block_size" not in described:
        raise UsageError("oft_block_size is not said: the adapter is of a PEFT whose OFT was another one (before 0.14)")
    sizes = {name: _block_size(held["oft_R.weight"]) for name, held in layers.items()}
    size, found = int(described["oft_block_size"]), sorted(set(sizes.values()))
    if described.get("r") and len(found) > 1:
        raise UsageError(
            f"r is {described['r']}, so many blocks in each layer, which makes blocks of {found} inputs; accepted: r: 0 with an "
            "oft_block_size, or layers with as many inputs"
        )
    shared = bool(described["block_share"])
    config = SubspaceConfig(
        method="oft",
        target_modules=tuple(layers),
        modules_to_save=tuple(saved),
        options={
            "oft_block_size": found[0] if described.get("r") else size,
            "block_share": shared,
            "cayley": "neumann" if described["use_cayley_neumann"] else "exact",
            "neumann_terms": int(described["num_cayley_neumann_terms"]),
        },
    )
    rows = {name: held["oft_R.weight"].shape[0] for name, held in layers.items()}
    shapes: Shapes = {name: (None, None if shared else rows[name] * own) for name, own in sizes.items()}
    return Imported(config, flat(layers, saved), described, shapes)


def _block_size(above: Tensor) -> int:
    """b of `(blocks, b (b - 1) / 2)`."""
    return (1 + math.isqrt(1 + 8 * above.shape[1])) // 2


def _tokens(method: str, **options: Any) -> Kind:
    def read(described: Described, tensors: dict[str, Tensor], saved: Layers) -> Imported:
        task, stacks = described.get("task_type"), described.get("num_transformer_submodules") or 1
        accepted = LANGUAGE_TASKS[:1] if method == "prefix" else LANGUAGE_TASKS
        if task not in accepted:
            raise UsageError(f"task_type is {task!r}; accepted for {described['peft_type']}: {', '.join(accepted)}")
        if stacks != 1 and method != "prefix":
            raise UsageError(
                f"num_transformer_submodules is {stacks}, one of them the decoder's; accepted: 1, the encoder's"
            )
        if set(tensors) != {EMBEDDINGS}:
            raise UsageError(
                f"the adapter of virtual tokens holds {', '.join(tensors) or 'nothing'}; accepted: {EMBEDDINGS}"
            )
        count = int(tensors[EMBEDDINGS].shape[0])
        config = SubspaceConfig(
            method=method, modules_to_save=tuple(saved), options={"num_virtual_tokens": count, **options}
        )
        return Imported(config, {EMBEDDINGS: tensors[EMBEDDINGS].float(), **flat({}, saved)}, described)

    return read


KINDS: dict[str, Kind] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "VERA": _vera,
    "MISS": _miss,
    "OFT": _oft,
    "PROMPT_TUNING": _tokens("prompt", init="normal", placement="front"),
    "P_TUNING": _tokens("p-tuning", encoder="none", placement="front"),
    "PREFIX_TUNING": _tokens("prefix"),
}
