"""TRL's losses of preferences, called with log probabilities that are there already.

Written against trl 1.16.0, whose DPO and KTO losses stand inside a method of their trainers, `_compute_loss`, which asks the
trainer for settings and a model for log probabilities. Both are stood in for: the settings by a namespace, the model by a
function that returns what was computed here. `check_trl` calls each once and compares, so that a release that asks for
something else is refused before a run. ORPO's is a public method.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dist_subspace.config.preference import LOSSES, PreferenceArguments
from dist_subspace.errors import UsageError

_INSTALL = "pip install dist-subspace[trl]"


def paired_loss(
    arguments: PreferenceArguments, logps: Tensor, completions: Tensor, reference: Tensor, training: bool = True
) -> Tensor:
    """DPO's loss, a mean over the pairs.

    Arguments:
        logps: `(2 n, t - 1)` float32, of each token of an answer, 0 elsewhere: the n chosen ones, then the n rejected.
        completions: `(2 n, t)`: 1 at the tokens of answers.
        reference: `(2 n,)`, the answers' sums under the base.
    """
    from trl import DPOTrainer

    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": completions,
        "completion_mask": completions,
        "attention_mask": completions,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    trainer = _trainer(arguments, logps, training)
    trainer.loss_types, trainer.loss_weights = [arguments.loss_type or LOSSES["dpo"][0]], [1.0]
    trainer.f_divergence_type, trainer.ld_alpha, trainer.use_weighting = "reverse_kl", None, False
    loss: Tensor = DPOTrainer._compute_loss(trainer, _answering(logps), inputs, False)
    return loss


def unpaired_loss(
    arguments: PreferenceArguments,
    logps: Tensor,
    completions: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor,
    training: bool = True,
) -> Tensor:
    """KTO's loss, a mean over the answers.

    Arguments:
        logps: `(n, t - 1)`; completions: `(n, t)`; reference: `(n,)`, as for `paired_loss`.
        desirable: `(n,)` bool.
        kl: a number, how far the model is from the base on answers to other prompts, as a mean of their logarithms.
    """
    from trl import KTOTrainer

    inputs = {
        "input_ids": completions,
        "completion_mask": completions,
        "attention_mask": completions,
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros_like(kl),
    }
    trainer = _trainer(arguments, logps, training)
    trainer.loss_type = arguments.loss_type or LOSSES["kto"][0]
    trainer.calculate_KL = needs_kl(arguments)
    trainer.desirable_weight, trainer.undesirable_weight = arguments.desirable_weight, arguments.undesirable_weight
    trainer._compute_kl_logps = lambda model, batch: kl
    loss: Tensor = KTOTrainer._compute_loss(trainer, _answering(logps), inputs, False)
    return loss + 0.0 * logps.sum()  # a mean that leaves out what is no number would hide it


def needs_kl(arguments: PreferenceArguments) -> bool:
    """Whether KTO's loss asks for the distance from the base."""
    return (arguments.loss_type or LOSSES["kto"][0]) == "kto"


def odds_ratio(arguments: PreferenceArguments, chosen: Tensor, rejected: Tensor) -> Tensor:
    """What ORPO subtracts from the chosen texts' loss, `(n,)`, for mean log probabilities of the answers' tokens, `(n,)` each."""
    trainer = SimpleNamespace(beta=arguments.beta, accelerator=SimpleNamespace(device=chosen.device))
    made: Tensor = _orpo_trainer().odds_ratio_loss(trainer, chosen, rejected)[0]
    return made


def check_trl(objective: str, arguments: PreferenceArguments) -> None:
    """TRL is there, and computes what was read in it.

    Raises:
        UsageError: with what installs it.
    """
    if importlib.util.find_spec("trl") is None:
        raise UsageError(
            f"training.objective is {objective!r}, which TRL computes, which is not installed; accepted: {_INSTALL}"
        )
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]])
    completions, reference = torch.tensor([[0, 1, 1], [0, 1, 1]]), logps.sum(1)
    usual = PreferenceArguments()
    try:
        if objective == "dpo":
            found = paired_loss(usual, logps, completions, reference)
            paired_loss(arguments, logps, completions, reference)
            expected = math.log(2)
        elif objective == "kto":
            labels, kl = torch.tensor([True, False]), torch.zeros(1)
            found = unpaired_loss(usual, logps, completions, reference, labels, kl)
            unpaired_loss(arguments, logps, completions, reference, labels, kl)
            expected = 0.5
        else:
            found = odds_ratio(usual, logps[:1, 0], logps[:1, 0])[0]
            expected = -usual.beta * math.log(2)
    except (AttributeError, KeyError, TypeError, ImportError) as error:
        raise _other(objective, f"{type(error).__name__}: {error}") from error
    if not math.isclose(float(found), expected, rel_tol=1e-5):
        raise _other(objective, f"its loss of a known case is {float(found):.6f}, and was {expected:.6f}")


def _other(objective: str, reason: str) -> UsageError:
    import trl

    return UsageError(
        f"training.objective is {objective!r}, and TRL {trl.__version__} does not compute it as 1.16.0 does ({reason}); "
        f"accepted: {_INSTALL}"
    )


def _orpo_trainer() -> Any:
    """Said by TRL to be experimental, which a run need not be told at every start."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    return ORPOTrainer


def _trainer(arguments: PreferenceArguments, logps: Tensor, training: bool) -> Any:
    """What both losses ask of their trainer. Nothing is gathered: figures are summed over the ranks here."""

    def alone(value: Any) -> Any:
        return value

    return SimpleNamespace(
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(device=logps.device, gather=alone, gather_for_metrics=alone),
        args=SimpleNamespace(),
        beta=arguments.beta,
        label_smoothing=arguments.label_smoothing,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def _answering(logps: Tensor) -> Callable[..., Any]:
    """The model, as the losses call it."""
    nothing = torch.zeros_like(logps)
    made = SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return lambda **inputs: made
