"""Put a method on a model: choose its targets, wrap them, freeze everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.blocks import runs_as_one_function
from dist_subspace.families.embeddings import input_embeddings
from dist_subspace.families.heads import head_names
from dist_subspace.families.names import ends_with
from dist_subspace.families.norms import is_norm, stated_width
from dist_subspace.module_places import move_hooks, replace_everywhere
from dist_subspace.notices import say
from dist_subspace.subspace.beside.new_tokens import NewTokens, check_new_tokens
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.subspace.config import Resolved, layer_settings, resolve, with_capped_rank
from dist_subspace.subspace.core.accumulation import Accumulation, watch_loss
from dist_subspace.subspace.core.collect import GradientCollector
from dist_subspace.subspace.core.constrained import ConstrainedFactors
from dist_subspace.subspace.core.constraints import PENALTIES, Penalties, Penalty
from dist_subspace.subspace.core.initial import InitialFromModel
from dist_subspace.subspace.core.operator import Operator, Stack
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.schedule import Schedule, schedule_class_of
from dist_subspace.subspace.core.shared import shared_of
from dist_subspace.subspace.core.sites import OnModel, largest_rank_of, sites_of
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.core.stacks import StackedPart, check_stacked, choose_stacks, unnamed_stacks
from dist_subspace.subspace.core.targets import ALL_LINEAR, Choice, LeftOut, check_excluded
from dist_subspace.subspace.core.trained import Gathered, TrainedModule


@dataclass(frozen=True)
class Attachment:
    """What `attach` did, kept on the model: the configuration, the parts' names and settings, the modules trained in full,
    and every trained parameter's name and shape (which a partitioned parameter no longer shows).

    accumulation: how the running backward is weighted; penalties: of a constraint, else None; schedule: the method's plan
    over the steps, else None; collector: the gradients that the plan needs, else None; new_tokens: their rows, else None;
    factor_keys: the names under which the statistics of the layers are kept, by layer; factor_digests: sha256 of those files, by
    path, once they were asked for; loaded: the tensors that came from an adapter's file, by their names there.
    """

    config: SubspaceConfig
    resolved: Resolved
    layers: tuple[str, ...]
    saved_modules: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    accumulation: Accumulation = field(default_factory=Accumulation)
    penalties: Penalties | None = None
    schedule: Schedule | None = None
    collector: GradientCollector | None = None
    new_tokens: NewTokens | None = None
    factor_keys: dict[str, str] = field(default_factory=dict)
    factor_digests: dict[str, str] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)

    @property
    def info(self) -> MethodInfo:
        return self.resolved.info

    @property
    def settings(self) -> Settings:
        """What was resolved for the model as a whole; a layer of a pattern has its own."""
        return self.resolved.settings


def attach_method(
    model: nn.Module,
    config: SubspaceConfig,
    gathered: Gathered,
    known: Container[str] = (),
    apart: Mapping[str, str] | None = None,
    only: Collection[str] = (),
) -> nn.Module:
    """Put the configured method on the model; its linear layers are frozen operators already.

    Statistics of the frozen matrices are not made here: parts that have one are settled afterwards.

    Arguments:
        gathered: a context in which the given parameters are whole (collective where they are split over ranks).
        known: the sites whose statistics need not be made.
        apart: linear layers of the model that are no operators, and why.
        only: where a method's own target names mean more layers than these, these alone (an adapter's, made earlier).

    Raises:
        UsageError: for a model that has a method already, a target that matches nothing, a rank above a layer's
            dimensions, and what `resolve` refuses. The model is untouched then.
    """
    if attachment(model) is not None:
        raise UsageError("the model has a subspace method already; attach takes a model without one")
    resolved = resolve(config)
    saved = _modules_to_save(model, config)
    trained_in_full = [n for n, _ in model.named_modules() if any(n == s or n.startswith(f"{s}.") for s in saved)]
    if not only:
        check_excluded(model, config.exclude_modules)
    exclude = [*config.exclude_modules, *trained_in_full]
    given, options = config.target_modules is not None, resolved.settings.options
    choice = Choice(model, resolved.targets, given, exclude, head_names(model), options, apart or {}, only=only)
    stacks = choose_stacks(model, config.target_parameters)
    if stacks:
        check_stacked(resolved.method, resolved.settings)
    sites = {} if stacks and not given else sites_of(resolved.method, choice)
    if config.target_modules in (None, ALL_LINEAR) and any(
        isinstance(site, Operator | Stack) for site in sites.values()
    ):
        in_full = tuple(f"{name}." for name in trained_in_full)
        choice.left_out.add({n: why for n, why in unnamed_stacks(model, stacks).items() if not n.startswith(in_full)})
    with gathered(_norm_weights(sites)):
        if config.target_modules in (None, ALL_LINEAR):
            sites = _with_room(sites, resolved, choice.left_out)
        sites = choice.in_order({**sites, **stacks})
        largest = {name: largest_rank_of(resolved.method, site) for name, site in sites.items()}
    smallest = min((rank for rank in largest.values() if rank is not None), default=None)
    if smallest is not None:
        capped = with_capped_rank(resolved.settings, resolved.info, config, smallest)
        resolved = replace(resolved, settings=capped)
    settings = settings_of(sites, resolved, largest)
    for name, site in sites.items():
        one = site.operator(0) if isinstance(site, Stack) else site
        resolved.method.check_site(one, settings[name], name in known)
    linear = {name: site for name, site in sites.items() if name not in stacks}
    common = shared_of(resolved.method, linear, next(iter(settings.values())))
    if config.new_tokens:
        check_new_tokens(model, config.new_tokens, trained_in_full)
    model.requires_grad_(False)
    shared: dict[int, nn.Parameter] = {}
    copies = {model.get_submodule(name): model.get_submodule(name) for name in saved}
    for module in copies:
        copies[module] = TrainedCopy(module, gathered, shared)
    replace_everywhere(model, copies)
    tokens = NewTokens(model, config.new_tokens, gathered) if config.new_tokens else None
    with gathered(_norm_weights(sites)):
        parts = _put_parts(model, sites, settings, resolved, common)
    if tokens is not None:
        model.new_tokens = tokens
        tokens.connect_head(model)
    for part in parts.values():
        if isinstance(part, InitialFromModel):
            part.read_initial_values(model, gathered)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    accumulation, schedule = Accumulation(), schedule_class_of(resolved.method)
    model.subspace = Attachment(  # type: ignore[assignment]
        config=config,
        resolved=resolved,
        layers=tuple(parts),
        saved_modules=tuple(saved),
        shapes=shapes,
        accumulation=accumulation,
        penalties=_penalise(model, parts, resolved, accumulation),
        schedule=None if schedule is None else schedule(parts, resolved.settings, config.seed),
        collector=_collect(parts, resolved),
        new_tokens=tokens,
    )
    for sentence in choice.left_out.sentences(resolved.targets):
        say(sentence)
    watch_loss(model, accumulation)
    _let_gradients_start_at_the_embeddings(model)
    return model


def _norm_weights(sites: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Of the norms among the sites that do not tell their width, the weights that do: whole, where they are split over ranks."""
    norms = [site for site in sites.values() if is_norm(site) and stated_width(site) is None]
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]


def _with_room(sites: dict[str, nn.Module], resolved: Resolved, left_out: LeftOut) -> dict[str, nn.Module]:
    """Of the sites of a default target those that can have the rank. Where an unset rank is cut to the smallest site
    (`info.capped`), one of less than a sixteenth of the largest does not set it: a gate of one row would cut all to 1."""
    config, bounds = resolved.config, {name: largest_rank_of(resolved.method, site) for name, site in sites.items()}
    known = [bound for bound in bounds.values() if bound is not None]
    least = resolved.settings.rank
    if resolved.info.capped and config.rank is None and known:
        least = min(least, max(known) // 16)
    named = [name for name in sites if any(ends_with(name, ending) for ending in config.rank_pattern)]
    small = {n: bound for n, bound in bounds.items() if bound is not None and bound < least and n not in named}
    if len(small) == len(sites):
        return sites  # which is refused
    left_out.add({name: f"rank {least} is above its smaller side, {bound}" for name, bound in small.items()})
    return {name: site for name, site in sites.items() if name not in small}


def settings_of(sites: dict[str, nn.Module], resolved: Resolved, largest: dict[str, int | None]) -> dict[str, Settings]:
    """Each site's settings: the model's, or a pattern's, cut to the site's dimensions where the method allows that."""
    config = resolved.config
    for what in ("rank_pattern", "alpha_pattern"):
        for ending in () if what in resolved.unused else getattr(config, what):
            if not any(ends_with(name, ending) for name in sites):
                raise UsageError(
                    f"subspace.{what} has {ending!r}, which names no target; targets here are for example: "
                    f"{', '.join(list(sites)[:4])}"
                )
    smallest = min((rank for rank in largest.values() if rank is not None), default=0)
    settings = {}
    for name in sites:
        rank = next((r for ending, r in config.rank_pattern.items() if ends_with(name, ending)), config.rank)
        alpha = next((a for ending, a in config.alpha_pattern.items() if ends_with(name, ending)), config.alpha)
        uncut = layer_settings(config, resolved.method, rank, alpha)
        settings[name] = uncut if largest[name] is None else with_capped_rank(uncut, resolved.info, config, smallest)
    _check_ranks(sites, settings, {name: bound for name, bound in largest.items() if bound is not None})
    return settings


def _put_parts(
    model: nn.Module, sites: dict[str, nn.Module], settings: dict[str, Settings], resolved: Resolved, shared: Any
) -> dict[str, SubspacePart]:
    config = resolved.config
    dtype = getattr(model, "dtype", torch.float32)
    parts: dict[str, SubspacePart] = {}
    instead: dict[nn.Module, nn.Module] = {}
    for name, site in sites.items():
        generator = torch.Generator().manual_seed(seed_of(config.seed, name))
        if isinstance(site, Stack):
            part: SubspacePart = StackedPart(site, resolved.method, settings[name], generator)
        else:
            part = resolved.method.build(site, settings[name], generator, shared)
        part.compute_dtype, part.name = dtype, name
        device = next((p.device for p in site.parameters()), torch.device("cpu"))
        for factor, parameter in part.trainables().items():
            setattr(part, factor, nn.Parameter(parameter.data.to(device)))
        part.train(site.training)
        if isinstance(part, OnModel):
            setattr(model, part.attribute, part)
            part.connect(model)
            parts[part.attribute] = part
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part)
        parts[name] = instead[site] = part
        move_hooks(site, part)
    replace_everywhere(model, instead)
    return parts


def _penalise(
    model: nn.Module, parts: dict[str, SubspacePart], resolved: Resolved, accumulation: Accumulation
) -> Penalties | None:
    constraint = resolved.settings.constraint
    if constraint is None or constraint.kind not in PENALTIES:
        return None
    penalties = Penalties(constraint, accumulation)
    for name, part in parts.items():
        if isinstance(part, ConstrainedFactors):
            factors = [factor for factor in part.constrained_factors() if factor is not None]
            penalties.layers += bool(factors)
            penalties.matrices += len(factors)
            part.penalty = Penalty(name, penalties)
    penalties.watch(model)
    return penalties


def _collect(parts: dict[str, SubspacePart], resolved: Resolved) -> GradientCollector | None:
    kind = schedule_class_of(resolved.method)
    if kind is None or not kind.needs_gradients:
        return None
    return GradientCollector(
        {f"{name}.{factor}": p for name, part in parts.items() for factor, p in part.trainables().items()}
    )


def attachment(model: nn.Module) -> Attachment | None:
    return getattr(model, "subspace", None)


def attached(model: nn.Module) -> Attachment:
    """The model's attachment; a UsageError if it has none."""
    its_attachment = attachment(model)
    if its_attachment is None:
        raise UsageError("the model has no subspace method; call attach first")
    return its_attachment


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what the frozen base computes alone."""
    parts = [m for m in model.modules() if isinstance(m, TrainedModule)]
    before = [part.enabled for part in parts]
    for part in parts:
        part.enabled = False
    try:
        yield model
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


def seed_of(seed: int, name: str) -> int:
    """A layer's initial values depend on its name alone: not on the rank, nor on which other layers are targets."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _check_ranks(sites: dict[str, nn.Module], settings: dict[str, Settings], bounds: dict[str, int]) -> None:
    """Of several layers that are too small, the smallest is named."""
    too_small = [name for name, bound in bounds.items() if settings[name].rank > bound]
    if too_small:
        name = min(too_small, key=lambda name: bounds[name])
        site, bound = sites[name], bounds[name]
        size = f"{site.out_features} x {site.in_features}" if isinstance(site, Operator) else f"{bound} wide"
        raise UsageError(
            f"subspace.rank is {settings[name].rank}, but {name} is {size}; accepted: at most {bound} "
            "(or leave such layers out by subspace.exclude_modules)"
        )


def _modules_to_save(model: nn.Module, config: SubspaceConfig) -> list[str]:
    """The names in `modules_to_save`, and the modules whose parameters are tied to theirs."""
    names = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    wanted: list[str] = []
    for ending in config.modules_to_save:
        named = [name for name in names if ends_with(name, ending)]
        if not named:
            shown = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names[-12:]))
            raise UsageError(
                f"subspace.modules_to_save has {ending!r}, which names no module; names here end in: {shown}"
            )
        _refuse_stacks(model, ending, named)
        wanted += [name for name in named if name not in wanted]
    owned = {id(p) for name in wanted for p in model.get_submodule(name).parameters()}
    inside = [n for n in names if any(n.startswith(f"{w}.") or w.startswith(f"{n}.") for w in wanted)]  # or around one
    tied = [n for n in names if any(id(p) in owned for p in model.get_submodule(n).parameters(recurse=False))]
    wanted += [name for name in tied if name not in wanted and name not in inside]
    return [name for name in wanted if not any(name.startswith(f"{other}.") for other in wanted)]


def _refuse_stacks(model: nn.Module, ending: str, named: Sequence[str]) -> None:
    """A copy of a packed stack of experts would be trained in none of its values."""
    for name in named:
        for inner, module in model.get_submodule(name).named_modules():
            if isinstance(module, Stack):
                raise UsageError(
                    f"subspace.modules_to_save has {ending!r}, which names the experts {f'{name}.{inner}'.rstrip('.')}, held as "
                    f"{module.storage}: they cannot be trained in full; accepted: other modules, or a model.storage of floats"
                )


def _let_gradients_start_at_the_embeddings(model: nn.Module) -> None:
    """Reentrant checkpointing passes gradients only where an input of the block asks for one; with frozen embeddings none
    does, and training fails (docs/failures.md, "Gradient checkpointing finds nothing that requires a gradient"). Blocks that
    are one autograd function with a backward of its own do the same."""
    embeddings = input_embeddings(model)
    if embeddings is None:
        return
    one_function = runs_as_one_function(model)

    def require(module: nn.Module, inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled() and module.training and (one_function or _is_checkpointing(model)):
            output.requires_grad_(True)

    embeddings.register_forward_hook(require)


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether activation checkpointing is on, as transformers marks it on its blocks."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
