"""What families call the parts of a mixture of experts."""

from __future__ import annotations

from torch import nn

# Words in the name of a stack of experts, or of its class (`MixtralExperts`, `JetMoeParallelExperts`, `block_sparse_moe`).
MIXTURE_WORDS = ("expert", "moe")
# The list of experts that are modules of their own.
EXPERT_LIST = ".experts."
# A router that is a module of several layers: `mlp.gate` (Zaya, HunYuan), `router` (DBRX, JetMoe, AFMoE).
ROUTERS = ("gate", "router")


def is_expert_matrix(name: str, module: nn.Module, dimensions: int) -> bool:
    """Whether a parameter is a stack of matrices of a mixture of experts, or lies in a list of them.

    Arguments:
        name: the parameter's, whole.
        module: that has it.
        dimensions: of the whole parameter, which may be split over ranks.
    """
    spoken = f"{name} {type(module).__name__}".lower()
    return (dimensions == 3 and any(word in spoken for word in MIXTURE_WORDS)) or EXPERT_LIST in name


def is_inside_router(name: str) -> bool:
    """Whether a module of that name is a part of a router, which decides which experts a token goes to. Zaya's has an MLP, whose
    layers are called as those of an FFN (`mlp.gate.router_mlp.fc2`)."""
    return any(component in ROUTERS for component in name.split(".")[:-1])
