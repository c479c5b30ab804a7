"""What a method is: something trained on a module of the frozen model, most often on a linear operator, in product form.

A method file holds, in this order: the formula and its reference; a registration; the parameters and their initial values;
the product form; merge; where it differs from the default, how the file names its tensors. A method on a linear operator asks
it three questions (apply, shape, dense) and knows neither how the matrix is stored nor where its bytes lie.

Every part is a `SubspacePart`, and on a linear operator a `SubspaceLinear` (linear.py). What only some have is a class of its
own. A method has it by inheriting, and who asks for it asks by type (`isinstance`, `issubclass`):

    sites.py        OwnSites             which modules get a part: bitfit, houlsby, p-tuning, pfeiffer, prefix, prompt
                    OnModel              stands beside the whole model: p-tuning, prefix, prompt
                    AddsPositions        takes positions of the model: p-tuning, prefix, prompt
                    OwnRankBound         the largest rank of a site: miss, pfeiffer
    shared.py       SharedAcrossLayers   what all layers have in common: ia3, vera
    initial.py      TextOptions          reads options that are text: prompt
                    InitialFromModel     reads initial values off the model: prompt
    statistic.py    Decomposes           takes the frozen matrix apart: lora-dash, and those of the next three
                    SetupStatistic       does so before training: dora, and those of the next two
                    KeepsFactors         the file holds what it found: lora-xs, sam-parser, spectral-additive,
                                         spectral-rotational, svdiff, and those of the next one
                    FoldsIntoBase        can give the base another matrix: lora, milora, olora, pissa, rslora
    schedule.py     Scheduled            a plan over the steps: adalora, flexlora, lora-dash
    constrained.py  ConstrainedFactors   factors that a constraint acts on: adalora, dora, flexlora, flora, liera, lora,
                                         lora-dash, lora-fa, milora, moslora, olora, parallel-adapter, pissa, rslora, trilora
    bias.py         ScalesBias           scales the frozen bias: ia3, ssb
                    AddsBias             brings a bias along: bitfit
    merging.py      MergesIntoNorm       merges into a norm: the parts of bitfit and houlsby on norms
    forms.py        LowRankForm          its update is a product of thin matrices: adalora, flexlora, flora, lora, lora-dash,
                                         lora-fa, lora-xs, milora, miss, moslora, olora, pissa, rslora, sam-parser,
                                         spectral-additive, spectral-rotational, svdiff, trilora, vera
                    ScalingForm          it scales inputs and outputs: ia3, ssb, ssl
                    RotationForm         it turns the inputs: oft
    files.py        FileOptions          has other options once it is loaded: p-tuning, prefix
                    FrozenInFile         the file holds frozen parameters too: lora-fa, vera
    rates.py        LearningRateRatio    factors with a learning rate of their own: lora, rslora
    peft_words.py   PeftWords            what PEFT says of the method; no part, it stands at the end of the method's file
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from dist_subspace.subspace.core.peft_words import PeftWords
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.core.trained import TrainedModule


class SubspacePart(TrainedModule):
    """What a method puts on one site of the model. Its trained parameters lie on this module, and are read in its `forward`
    (a sharding engine gathers a module's own parameters when the module is called).
    """

    info: ClassVar[MethodInfo]

    # What PEFT says of the method; None where PEFT has no such method.
    peft: ClassVar[PeftWords[Any] | None] = None

    settings: Settings
    name: str = "a layer"  # of its site in the model, set by attach: for messages
    # The type that the model computes in, set by attach: frozen factors are held in it.
    compute_dtype: torch.dtype = torch.float32

    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        """Fill in defaults that depend on other values, and refuse values that contradict one another (UsageError)."""
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
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        """The part for one site, its parameters made, equal on every rank: random draws come from `generator` (CPU) alone.

        Arguments:
            shared: what `SharedAcrossLayers.make_shared` gave for all sites; None for other methods.
        """
        raise NotImplementedError
