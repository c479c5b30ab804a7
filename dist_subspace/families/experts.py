"""What families call the parts of a mixture of experts, and how they hold the experts' matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

# Words in the name of a stack of experts, or of its class (`MixtralExperts`, `JetMoeParallelExperts`, `block_sparse_moe`).
MIXTURE_WORDS = ("expert", "moe")
# The list of experts that are modules of their own.
EXPERT_LIST = ".experts."
# What decides which experts a token goes to: a module with a matrix of its own (`mlp.gate`, `feed_forward.router`), or one of
# several layers (Zaya, HunYuan, DBRX, JetMoe, AFMoE).
ROUTERS = ("gate", "router", "router_gate")
# Of the stacks of one module those that its class makes last: after them there is none.
LAST_STACKS = ("down_proj", "output_linear")


@dataclass(frozen=True)
class Stacks:
    """How a module holds its experts: parameters `(experts, d_out, d_in)`, or `(experts, d_in, d_out)` where `transposed`.

    entering: what the tokens are multiplied with first. leaving: what the result is multiplied with; None where the module
    is one product alone. call: what its forward is given: `routed`, tokens and each one's experts, by transformers' interface
    for experts; `routed_apart`, the same by a class of its own; `or_passed`, the same, where an expert beyond those that have
    weights passes its tokens on as they are; `every_token`, every expert's own copy of all tokens, one behind the other;
    `sorted`, tokens in the order of their experts, and how many each has.
    """

    entering: str
    leaving: str | None
    transposed: bool = False
    call: str = "routed"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.entering,) if self.leaving is None else (self.entering, self.leaving)


# Classes that do not use transformers' interface for experts.
OWN_CLASSES: Mapping[str, Stacks] = {
    "Llama4TextExperts": Stacks("gate_up_proj", "down_proj", transposed=True, call="every_token"),
    "LongcatFlashExperts": Stacks("gate_up_proj", "down_proj", call="or_passed"),
    "Step3p7Experts": Stacks("gate_up_proj", "down_proj", call="routed_apart"),
    "JetMoeParallelExperts": Stacks("weight", None, call="sorted"),
}
# What transformers' interface sets on a module that uses it.
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def stacks_of(module: nn.Module) -> Stacks | None:
    """How the module holds a mixture's experts; None for a module that holds none, or in a way that is not known here."""
    stacks = OWN_CLASSES.get(type(module).__name__)
    if stacks is None and all(hasattr(module, name) for name in _INTERFACE):
        entering = "gate_up_proj" if module.has_gate else "up_proj"
        stacks = Stacks(entering, "down_proj", transposed=bool(module.is_transposed))
    if stacks is None or any(getattr(module, name, None) is None for name in stacks.names):
        return None
    return stacks


def is_expert_matrix(name: str, module: nn.Module, dimensions: int) -> bool:
    """Whether a parameter is a stack of matrices of a mixture of experts, or lies in a list of them.

    Arguments:
        name: the parameter's, whole.
        module: that has it.
        dimensions: of the whole parameter, which may be split over ranks.
    """
    spoken = f"{name} {type(module).__name__}".lower()
    return (dimensions == 3 and any(word in spoken for word in MIXTURE_WORDS)) or EXPERT_LIST in name


def routers_among(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the names of a model's modules or parameters those of routers and what is inside them; none where it has no experts."""
    mixture = any(w in f"{n} {type(m).__name__}".lower() for n, m in model.named_modules() for w in MIXTURE_WORDS)
    return [n for n in names if any(part in ROUTERS for part in n.split("."))] if mixture else []


def is_inside_router(name: str) -> bool:
    """Whether a module of that name is a part of a router, which decides which experts a token goes to. Zaya's has an MLP, whose
    layers are called as those of an FFN (`mlp.gate.router_mlp.fc2`)."""
    return any(component in ROUTERS for component in name.split(".")[:-1])


def callers_of_experts(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward calls some entries of a list of experts, those that its tokens go to: the list itself where it
    has a forward (NLLB-MoE, Switch Transformers), else the module that holds it."""
    found = []
    for name, module in model.named_modules():
        spoken = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and any(word in spoken for word in MIXTURE_WORDS):
            has_forward = type(module).forward is not nn.Module.forward
            found.append(module if has_forward else model.get_submodule(name.rpartition(".")[0]))
    return found
