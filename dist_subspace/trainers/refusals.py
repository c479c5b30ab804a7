"""What `TrainerMixin` cannot be right with, said before a trainer is made: one sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from dist_subspace.errors import UsageError
from dist_subspace.loading.load import fresh_modules
from dist_subspace.subspace import TrainedModule, attached, attachment, parameter_groups

# TRL's trainers that go with it; those that multiply by the weight of the head themselves, and those with a reference.
READS_HEAD = ("SFTTrainer", "DPOTrainer", "KTOTrainer")
WITH_REFERENCE = ("DPOTrainer", "KTOTrainer")
OF_TRL = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")


def check_trainer(kind: type) -> None:
    """Raises UsageError for a class that stands before a Trainer's, or beside one of TRL's that the mixin does not know."""
    if not issubclass(kind, Trainer):
        return  # a mixin of its own
    names = [base.__name__ for base in kind.__mro__]
    if names.index("TrainerMixin") > kind.__mro__.index(Trainer):
        raise UsageError(
            f"{kind.__name__} has TrainerMixin behind its trainer, where it changes nothing; accepted: "
            f"class {kind.__name__}(dist_subspace.TrainerMixin, ...)"
        )
    theirs = trainer_of_trl(kind)
    if theirs is not None and theirs not in OF_TRL:
        raise UsageError(
            f"{kind.__name__} is made from TRL's {theirs}, which TrainerMixin does not know; accepted: {', '.join(OF_TRL)}, and "
            "Hugging Face's Trainer"
        )


def trainer_of_trl(kind: type) -> str | None:
    """The name of TRL's trainer that a class is made from; None where it is made from none."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "trl"]
    return next((base.__name__ for base in bases if not base.__name__.startswith("_")), None)


def takes_reference(kind: type) -> bool:
    return trainer_of_trl(kind) in WITH_REFERENCE


def check_arguments(kind: type, given: Mapping[str, Any]) -> None:
    """Local, alike on every rank.

    Arguments:
        given: the arguments of the trainer's constructor by name.

    Raises:
        UsageError: naming the argument, and what is accepted.
    """
    model, args = given.get("model"), given.get("args")
    if not isinstance(model, nn.Module) or attachment(model) is None:
        raise UsageError(
            f"model is {'a ' + type(model).__name__ if model is not None else 'None'} without a subspace method; accepted: what "
            "dist_subspace.attach(model, config) or dist_subspace.load_adapter(model, folder) returned"
        )
    _check_fresh(model)
    if given.get("peft_config") is not None:
        raise UsageError("peft_config is given, and the model has a method already; accepted: None")
    _check_placement(model, args, given)
    if takes_reference(kind):
        _check_reference(model, args, given)
    if trainer_of_trl(kind) in READS_HEAD or getattr(args, "use_liger_kernel", False):
        check_head(model, kind.__name__)


def _check_fresh(model: nn.Module) -> None:
    """A head that the checkpoint lacks holds random numbers: frozen, it would stay at them."""
    saved = attached(model).saved_modules
    left = [n for n in fresh_modules(model) if not any(n == s or n.startswith(f"{s}.") for s in saved)]
    if left:
        raise UsageError(
            f"the checkpoint of the model lacks {left[0]}, which was drawn at random and is frozen; accepted: "
            f"SubspaceConfig(modules_to_save={left!r})"
        )


def _check_placement(model: nn.Module, args: Any, given: Mapping[str, Any]) -> None:
    if getattr(args, "fsdp", None):
        raise UsageError("fsdp is given, which cannot split packed weights; accepted: deepspeed, with any ZeRO stage")
    if getattr(args, "save_on_each_node", False):
        raise UsageError("save_on_each_node is on; accepted: False, with an output_dir that all nodes see")
    deepspeed = _deepspeed_config(args)
    if deepspeed is None:
        return
    if any(part is not None for part in given.get("optimizers") or ()):
        raise UsageError(
            "optimizers is given with DeepSpeed, where Trainer drops it; accepted: optim and lr_scheduler_type"
        )
    groups = parameter_groups(model, 1.0, float(args.weight_decay))
    if "optimizer" in deepspeed and len({(group["lr"], group["weight_decay"]) for group in groups}) > 1:
        raise UsageError(
            "the DeepSpeed configuration has an optimizer, which would give all parameters one learning rate and weight decay; "
            "accepted: a configuration without it, and TrainingArguments' optim"
        )


def _deepspeed_config(args: Any) -> Mapping[str, Any] | None:
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def _check_reference(model: nn.Module, args: Any, given: Mapping[str, Any]) -> None:
    if given.get("ref_model") is not None:
        raise UsageError("ref_model is given, but the reference is `model` with its adapter off; accepted: None")
    if getattr(args, "sync_ref_model", False):
        raise UsageError("sync_ref_model is on, but the reference is the frozen base of `model`; accepted: False")
    early = getattr(args, "precompute_ref_log_probs", False)
    if early and _deepspeed_config(args) is not None:
        raise UsageError(
            "precompute_ref_log_probs is on with DeepSpeed, where TRL makes a second engine for it; accepted: False (the "
            "reference is `model` with its adapter off, and takes no memory)"
        )
    if attached(model).loaded and not early:
        raise UsageError(
            "the adapter of `model` was loaded, so that the reference would not be the policy that the training begins with; "
            "accepted: precompute_ref_log_probs=True, or a new adapter on the merged model (dist_subspace.merge)"
        )


def check_head(model: Any, reader: str) -> None:
    """Whether who multiplies by the weight of the model's head, and does not call the head, computes what the model computes.

    Raises:
        UsageError: a head that is packed, has a method, is trained in full, or has rows of new tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return
    name = next((name for name, module in model.named_modules() if module is head), "the head")
    reads = f"{reader} multiplies by the weight of {name} instead of calling it"
    if isinstance(head, TrainedModule):
        raise UsageError(
            f"{reads}, which has method {attached(model).info.name} on it or is trained in full, and would pass that by; "
            f"accepted: target_modules and modules_to_save without {name}"
        )
    if attached(model).new_tokens is not None:
        raise UsageError(f"{reads}, and would pass by the rows of the new tokens; accepted: no new_tokens")
    if not getattr(head, "is_float", True):
        raise UsageError(
            f"{reads}, which is held as {head.storage}, in packed bytes; accepted: load_frozen without head_storage"
        )
