"""LoRA on stacks of experts as PEFT has it (`target_parameters`): one A and one B a stack, the experts' side by side. Local.

    lora_A.weight (experts r, d_in)   row e r + j is row j of expert e's A
    lora_B.weight (d_out, r experts)  column j experts + e is column j of expert e's B

PEFT wraps a module once for each of its parameters, in their order, so that the file calls the last one's factors by the
module's name and those of each one before it by one more `base_layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import OWN
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.subspace import MethodInfo, SubspaceConfig, resolve
from dist_subspace.subspace.core.peft_words import PREFIX, Entries

PAIR = ("lora_A.weight", "lora_B.weight")
STACKS = "stacks"  # our entry that names them


def experts_entries(described: Entries, info: MethodInfo) -> dict[str, Any]:
    """Entries of adapter_config.json.

    Raises:
        UsageError: PEFT has no such adapter on experts.
    """
    ours = described[OWN]
    config = SubspaceConfig.of_dict(ours)
    instead = "accepted for it: merge, or save_adapter, whose folder load_adapter reads"
    if info.peft_type != "LORA":
        raise UsageError(f"method {info.name} on experts has no exact form in PEFT; {instead}")
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError(
            f"PEFT has no ranks and alphas of single stacks of experts (rank_pattern, alpha_pattern); {instead}"
        )
    resolved = resolve(config)
    words = resolved.method.peft
    assert words is not None  # LoRA's are PEFT's own
    linear = [name for name in ours["layers"] if name not in ours[STACKS]]
    return {
        **{key: value for key, value in described.items() if key != OWN},
        **{"peft_type": words.peft_type, **words.entries(resolved.settings), "lora_dropout": 0.0},
        **{"init_lora_weights": True, "target_modules": linear, "target_parameters": sorted(ours[STACKS])},
    }


def experts_tensors(native: Mapping[str, Tensor], stacks: Sequence[str]) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys.

    Arguments:
        native: by our file's keys; stacks: the names of the stacks, those of a module in the module's order.
    """
    tensors = dict(native)
    inside: dict[str, list[str]] = {}
    for name in stacks:
        inside.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in inside.items():
        for depth, name in enumerate(reversed(names)):
            a, b = (tensors.pop(file_key(name, suffix)) for suffix in PAIR)
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{place}.{PAIR[0]}"] = a.reshape(-1, a.shape[2])
            tensors[f"{place}.{PAIR[1]}"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return tensors
