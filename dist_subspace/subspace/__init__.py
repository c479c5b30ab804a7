"""What is trained, and how it acts. Knows torch and the operator's three questions; knows neither storage nor ZeRO."""

from dist_subspace.options import Option
from dist_subspace.subspace.attach import Attachment, attach_method, attached, attachment, disabled
from dist_subspace.subspace.beside.new_tokens import NewTokens
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.subspace.config import Resolved, resolve
from dist_subspace.subspace.core.accumulation import Accumulation
from dist_subspace.subspace.core.bias import AddsBias, ScalesBias
from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.files import file_options_of, frozen_in_file
from dist_subspace.subspace.core.forms import LowRankForm, RotationForm, ScalingForm
from dist_subspace.subspace.core.initial import TextOptions
from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.merging import MergesIntoNorm
from dist_subspace.subspace.core.operator import Operator, Weight
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import method_class, methods
from dist_subspace.subspace.core.schedule import Edit, Schedule, schedule_class_of
from dist_subspace.subspace.core.shared import shared_of
from dist_subspace.subspace.core.sites import AddsPositions, largest_rank_of
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.core.stacks import StackedPart
from dist_subspace.subspace.core.statistic import (
    Decomposes,
    FoldsIntoBase,
    KeepsFactors,
    SetupStatistic,
    keeps_factors,
    rebases,
)
from dist_subspace.subspace.core.trained import TrainedBeside, TrainedModule
from dist_subspace.subspace.groups import named_trainables, parameter_groups, trainable_parameters
from dist_subspace.subspace.learning_rates import SuggestedRate, suggested_rate

__all__ = [
    "Accumulation",
    "AddsBias",
    "AddsPositions",
    "Attachment",
    "Decomposes",
    "Edit",
    "FoldsIntoBase",
    "FrozenFactor",
    "KeepsFactors",
    "LowRankForm",
    "MergesIntoNorm",
    "MethodInfo",
    "NewTokens",
    "Operator",
    "Option",
    "Resolved",
    "RotationForm",
    "ScalesBias",
    "ScalingForm",
    "Schedule",
    "Settings",
    "SetupStatistic",
    "SubspaceConfig",
    "StackedPart",
    "SubspaceLinear",
    "SubspacePart",
    "SuggestedRate",
    "TextOptions",
    "TrainedBeside",
    "TrainedCopy",
    "TrainedModule",
    "Weight",
    "attach_method",
    "attached",
    "attachment",
    "disabled",
    "file_options_of",
    "frozen_in_file",
    "keeps_factors",
    "largest_rank_of",
    "method_class",
    "methods",
    "named_trainables",
    "parameter_groups",
    "rebases",
    "resolve",
    "schedule_class_of",
    "shared_of",
    "suggested_rate",
    "trainable_parameters",
]
