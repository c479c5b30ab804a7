"""What is trained, and how it acts. Knows torch and the operator's three questions; knows neither storage nor ZeRO."""

from dist_subspace.options import Option
from dist_subspace.subspace.attach import Attachment, attach_method, attached, attachment, disabled
from dist_subspace.subspace.beside.new_tokens import NewTokens
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.subspace.config import Resolved, SubspaceConfig, resolve
from dist_subspace.subspace.core.accumulation import Accumulation
from dist_subspace.subspace.core.factors import FrozenFactor
from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.operator import Operator, Weight
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import method_class, methods
from dist_subspace.subspace.core.schedule import Edit, Schedule
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.groups import named_trainables, parameter_groups, trainable_parameters

__all__ = [
    "Accumulation",
    "Edit",
    "FrozenFactor",
    "Schedule",
    "SubspacePart",
    "Weight",
    "Attachment",
    "MethodInfo",
    "NewTokens",
    "Operator",
    "Option",
    "Resolved",
    "Settings",
    "SubspaceConfig",
    "SubspaceLinear",
    "TrainedCopy",
    "attach_method",
    "attached",
    "attachment",
    "disabled",
    "method_class",
    "methods",
    "named_trainables",
    "parameter_groups",
    "resolve",
    "trainable_parameters",
]
