"""What a method is: something trained on a module of the frozen model, most often on a linear operator, in product form.

A method file holds, in this order: the formula and its reference; a registration; the parameters and their initial values;
the product form; merge; where it differs from the default, how the file names its tensors. A method on a linear operator asks
it three questions (apply, shape, dense) and knows neither how the matrix is stored nor where its bytes lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.subspace.core.constraints import Penalty
from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.operator import Operator, Weight
from dist_subspace.subspace.core.peft_words import PeftWords
from dist_subspace.subspace.core.spec import MethodInfo, Settings

if TYPE_CHECKING:
    from dist_subspace.subspace.beside.trained_copy import Gathered
    from dist_subspace.subspace.config import SubspaceConfig
    from dist_subspace.subspace.core.schedule import Schedule
    from dist_subspace.subspace.core.targets import Choice


class SubspacePart(nn.Module):
    """What a method puts on one site of the model. Its trained parameters lie on this module, and are read in its `forward`
    (a sharding engine gathers a module's own parameters when the module is called). They are created in float32, whatever
    the type of the computation.
    """

    info: ClassVar[MethodInfo]
    schedule_class: ClassVar[type[Schedule] | None] = None
    # Results of `decompose` that an adapter's file must hold, because they cannot be had again from the base alone. A part whose
    # options decide about it sets its own.
    kept_factors: tuple[str, ...] = ()
    # Trained parameters whose learning rate `lr_ratio` multiplies (LoRA+).
    left_factors: ClassVar[tuple[str, ...]] = ()
    # Trained parameters that are trained from a later step on. They have an optimizer group of their own, because an optimizer
    # that flattens its groups counts the steps of a group, and theirs begin anew then.
    late_factors: ClassVar[tuple[str, ...]] = ()

    # What PEFT says of the method; None where PEFT has no such method.
    peft: ClassVar[PeftWords[Any] | None] = None

    settings: Settings
    enabled: bool
    name: str = "a layer"  # of its site in the model, set by attach: for messages
    penalty: Penalty | None = None
    # The type that the model computes in, set by attach: frozen factors are held in it.
    compute_dtype: torch.dtype = torch.float32

    # Where it goes.

    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        """The modules of the model that get a part, by name, in the model's order. Raises UsageError where there are none."""
        return dict(choice.operators())

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        """Fill in defaults that depend on other values, and refuse values that contradict one another (UsageError)."""
        return settings

    @classmethod
    def read_text(cls, config: SubspaceConfig, tokenizer: Any) -> SubspaceConfig:
        """The configuration with token ids in the place of options that are text; called where a run has a tokenizer."""
        return config

    @classmethod
    def added_positions(cls, settings: Settings) -> int:
        """How many of the model's positions the method takes for itself in each sample."""
        return 0

    @classmethod
    def largest_rank(cls, site: nn.Module) -> int | None:
        """The largest rank that a part on this site can have; None where there is no bound."""
        return min(site.in_features, site.out_features) if isinstance(site, Operator) else None

    @classmethod
    def fitted(cls, settings: Settings, smallest: int, config: SubspaceConfig) -> Settings:
        """The settings for a layer whose smaller dimension is `smallest`; an unset rank may be cut to it (`info.capped`)."""
        if cls.info.capped and config.rank is None and settings.rank > smallest:
            return replace(settings, rank=smallest)
        return settings

    @classmethod
    def check_site(cls, site: Any, settings: Settings, known: bool) -> None:
        """Refuse (UsageError) a site that cannot have these settings, before anything of the model is changed.

        Arguments:
            site: a frozen operator also says whether its matrix is a float one (`is_float`), and where its original can be
                read (`origin`, or None).
            known: whether the site's statistic need not be made, because a file holds it.
        """

    @classmethod
    def shared(cls, sites: Mapping[str, nn.Module], settings: Settings, seed: int) -> Any:
        """What all parts of the model have in common (VeRA's projections); made once, given to each as `on(shared=...)`."""
        return None

    @classmethod
    def on(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any) -> SubspacePart:
        """The part for one site, its parameters made, equal on every rank: random draws come from `generator` (CPU) alone."""
        raise TypeError(f"{cls.__name__} does not say how it is made")

    @classmethod
    def put(cls, model: nn.Module, name: str, part: SubspacePart) -> str:
        """Put the part on the model; returns the part's own name. By default it takes the site's place."""
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part)
        return name

    def start(self, model: nn.Module, gathered: Gathered) -> None:
        """Collective where parameters are split: initial values that are read off the model, once the part is put on it.

        Arguments:
            gathered: a context in which the given parameters are whole.
        """

    # Statistics of the frozen matrix.

    @property
    def setup_statistic(self) -> str:
        """What this part needs of the frozen matrix before training: `none`, or in words what `decompose` finds."""
        return self.info.statistic

    @property
    def rebases(self) -> bool:
        """Whether `rebased` gives the base another matrix."""
        return False

    def decompose(self, weight: Weight) -> dict[str, Tensor]:
        """Local, expensive, on one rank: the statistic of the frozen matrix, float32 tensors by name."""
        raise TypeError(f"{type(self).__name__} has no statistic")

    def settle(self, factors: Mapping[str, Tensor]) -> None:
        """Local, alike on every rank: take what `decompose` found. Frozen factors go into `FrozenFactor` modules or frozen
        parameters (the caller splits them over the ranks), initial values into the trained parameters."""
        raise TypeError(f"{type(self).__name__} has no statistic")

    def rebased(self, factors: Mapping[str, Tensor], weight: Weight) -> Tensor | None:
        """The matrix `(d_out, d_in)` that the base shall hold in the place of its own (a folded residual); None: it stays."""
        return None

    # Merging.

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of the merged site from its frozen one, float32 on one device (None: it has none); parameters are whole."""
        return bias

    # Files.

    @classmethod
    def file_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a part has which is loaded from a file."""
        return dict(options)

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained tensors as the adapter's file holds them, by suffix (`lora_A.weight`)."""
        return {name: p.detach() for name, p in self.trainables().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `file_tensors`; parameters are whole."""
        for name, parameter in self.trainables().items():
            parameter.data.copy_(tensors[name])

    def beside(self) -> dict[str, nn.Parameter]:
        """Frozen parameters that `file_tensors` holds beside the trained ones, because PEFT's layout has them there, by suffix.
        One that begins with `base_model.` is the whole name: a tensor of the model, which one of its parts holds."""
        return {}

    def factor_tensors(self) -> dict[str, Tensor]:
        """The frozen factors that a complete adapter holds, by name; whole where their parameters are gathered."""
        found = {name: getattr(self, name) for name in self.kept_factors if getattr(self, name, None) is not None}
        return {name: (f.matrix if isinstance(f, FrozenFactor) else f).detach() for name, f in found.items()}

    # What its update is.

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        """`(A (r', d_in), B (d_out, r'))`, float32, with `ΔW = B A` exactly; None where the update is no such product."""
        return None

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None] | None:
        """`(s (d_in), l (d_out))`, float32, with `W' = diag(l) W diag(s)` exactly (None for all ones); None where it is not."""
        return None

    # What everyone uses.

    def trainables(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their own names."""
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}
