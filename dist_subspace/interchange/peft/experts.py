"""Low-rank updates of stacks of experts as PEFT has them (`target_parameters`): one A and one B a stack, the experts' side by
side. Local.

    lora_A.weight (experts r, d_in)   row e r + j is row j of expert e's A
    lora_B.weight (d_out, r experts)  column j experts + e is column j of expert e's B

PEFT wraps a module once for each of its parameters, in their order, so that the file calls the last one's factors by the
module's name and those of each one before it by one more `base_layer`. A stack `(experts, d_in, d_out)` whose class does not say
so (`is_transposed`; Llama 4) is `(experts, d_out, d_in)` to PEFT: its A is our B turned, and its B our A.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.experts import LAST_STACKS
from dist_subspace.families.names import ends_with
from dist_subspace.interchange.description import OWN, STACKS, TURNED
from dist_subspace.interchange.peft.trained_in_full import of_no_layer
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.subspace import LowRankForm, MethodInfo, StackedPart, SubspaceConfig, method_class, resolve
from dist_subspace.subspace.core.peft_words import PREFIX, Entries
from dist_subspace.subspace.core.spec import OWN as EXPERTS_OWN

PAIR = ("lora_A.weight", "lora_B.weight")
INSTEAD = "accepted for it: merge, or save_adapter, whose folder load_adapter reads"
Pair = tuple[Tensor, Tensor]


def is_direct(config: SubspaceConfig) -> bool:
    """Whether an adapter's own tensors are PEFT's, once they are put side by side."""
    words = method_class(config.method).peft
    return words is not None and words.on_experts and config.expert_parameters == EXPERTS_OWN


@torch.no_grad()
def pair_of(part: nn.Module) -> Pair | None:
    """`(A, B)` with `ΔW = B A`, float32 on the CPU, of a part whose parameters are whole: `(r', d_in)` and `(d_out, r')`, of a
    stack with the experts before; None where there is none."""
    if isinstance(part, LowRankForm):
        pair = part.low_rank_form()
        return None if pair is None else (pair[0].detach().float().cpu(), pair[1].detach().float().cpu())
    if not isinstance(part, StackedPart):
        return None
    pairs = [pair_of(part.expert(number)) for number in range(part.experts)]
    known = [pair for pair in pairs if pair is not None]
    return (
        (torch.stack([a for a, _ in known]), torch.stack([b for _, b in known])) if len(known) == len(pairs) else None
    )


def experts_files(
    described: Entries, info: MethodInfo, native: Mapping[str, Tensor], pairs: Mapping[str, Pair | None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entries of adapter_config.json, and the tensors under PEFT's keys.

    Arguments:
        native: the adapter's, by our file's keys; pairs: of its layers and stacks, where it is not direct.

    Raises:
        UsageError: PEFT has no such adapter on experts.
    """
    ours = described[OWN]
    config = SubspaceConfig.of_dict(ours)
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError(
            f"PEFT has no ranks and alphas of single stacks of experts (rank_pattern, alpha_pattern); {INSTEAD}"
        )
    if is_direct(config):
        resolved = resolve(config)
        words = resolved.method.peft
        assert words is not None  # LoRA's are PEFT's own
        own, tensors = words.entries(resolved.settings), dict(native)
    else:
        known = {name: pair for name, pair in pairs.items() if pair is not None}
        ranks = {pair[0].shape[-2] for pair in known.values()}
        if len(known) < len(ours["layers"]) or len(ranks) != 1 or not _pays(known):
            raise UsageError(f"method {info.name} on experts has no exact form in PEFT; {INSTEAD}")
        (rank,) = ranks
        own = {"r": rank, "lora_alpha": rank, "bias": "none"}
        tensors = of_no_layer(native, ours["layers"])
        tensors |= {file_key(n, suffix): t for n, pair in known.items() for suffix, t in zip(PAIR, pair, strict=True)}
    linear = [name for name in ours["layers"] if name not in ours[STACKS]]
    entries = {
        **{key: value for key, value in described.items() if key != OWN},
        **{"peft_type": "LORA", **own, "lora_dropout": 0.0, "init_lora_weights": True},
        **{"target_modules": linear, "target_parameters": sorted(ours[STACKS])},
    }
    return entries, experts_tensors(tensors, list(ours[STACKS]), ours.get(TURNED, ()))


def _pays(pairs: Mapping[str, Pair]) -> bool:
    """Whether the factors are smaller than the matrices that they change."""
    return sum(a.numel() + b.numel() - a[..., 0, :].numel() * b.shape[-2] for a, b in pairs.values()) < 0


def experts_tensors(
    native: Mapping[str, Tensor], stacks: Sequence[str], turned: Collection[str] = ()
) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys.

    Arguments:
        native: by our file's keys; stacks: the names of the stacks, those of a module in the module's order; turned: of them
            those whose layout PEFT takes for the other one.
    """
    tensors = dict(native)
    inside: dict[str, list[str]] = {}
    for name in stacks:
        inside.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in inside.items():
        for depth, name in enumerate(reversed(names)):
            a, b = (tensors.pop(file_key(name, suffix)) for suffix in PAIR)
            if name in turned:
                a, b = turned_pair(a, b)
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{place}.{PAIR[0]}"] = a.reshape(-1, a.shape[2])
            tensors[f"{place}.{PAIR[1]}"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return tensors


def stacks_of_peft(
    described: Entries, tensors: Mapping[str, Tensor], method: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The inverse of `experts_tensors`, for a folder that PEFT wrote: tensors by our file's keys, and the names of the stacks. A
    stack whose layout PEFT took for the other one is as PEFT has it still.

    Raises:
        UsageError: a method that PEFT does not have there, tensors that do not belong to `target_parameters`.
    """
    targets: Sequence[str] = described.get("target_parameters") or ()
    if not targets:
        return dict(tensors), ()
    words = method_class(method).peft
    if words is None or not words.on_experts:
        raise UsageError(
            f"target_parameters is {list(targets)!r}, on which PEFT has no method {method}; accepted: an adapter without them"
        )
    modules: dict[str, dict[int, str]] = {}
    for key in tensors:
        place = key.removeprefix(PREFIX).removesuffix(f".{PAIR[0]}")
        module = _without_wrappers(place)
        if key.endswith(PAIR[0]) and any(ends_with(f"{module}.{t.rpartition('.')[2]}", t) for t in targets):
            modules.setdefault(module, {})[place.count(".base_layer")] = place
    left, rank = dict(tensors), int(described["r"])
    stacks: list[str] = []
    for module, places in modules.items():
        own = {t.rpartition(".")[2] for t in targets if ends_with(f"{module}.{t.rpartition('.')[2]}", t)}
        names = sorted(own, key=lambda name: name in LAST_STACKS)
        if len(names) != len(places) or len(own - set(LAST_STACKS)) > 1:
            raise UsageError(
                f"target_parameters is {list(targets)!r}, but the adapter holds {len(places)} pairs of {module}, which do not "
                "say whose they are; accepted: an adapter on its experts' first and last matrices"
            )
        for depth, name in enumerate(reversed(names)):
            a, b = (left.pop(f"{PREFIX}{places[depth]}.{suffix}") for suffix in PAIR)
            stacks.append(f"{module}.{name}")
            left[file_key(stacks[-1], PAIR[0])] = a.reshape(-1, rank, a.shape[1])
            left[file_key(stacks[-1], PAIR[1])] = b.reshape(b.shape[0], rank, -1).permute(2, 0, 1)
    return left, tuple(stacks)


def _without_wrappers(place: str) -> str:
    while place.endswith(".base_layer"):
        place = place.removesuffix(".base_layer")
    return place


def turned_pair(a: Tensor, b: Tensor) -> Pair:
    """A and B of a stack whose layout PEFT takes for the other one, as the other side has them."""
    return b.transpose(1, 2), a.transpose(1, 2)
