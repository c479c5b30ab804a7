"""The right values: transformers' own model of a case, its inputs, and what it computes with other weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.families.cases import Case
from tests.families.exceptions import special
from tests.families.shrink import VOCABULARY

ROWS, EOS = 2, 2


def make_folder(case: Case, folder: Path) -> None:
    """A random model of the case, saved by transformers; biases and norms are random too, so that a lost one shows."""
    torch.manual_seed(0)
    maker = getattr(transformers, case.saved_by) if case.saved_by else case.auto_class
    model = maker.from_config(case.config(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.is_floating_point():
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():  # Funnel and Youtu write zeros there after a load, whatever the file holds
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.save_pretrained(folder)


def load(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return case.auto_class.from_pretrained(folder, dtype=dtype).eval()


def load_again(model: nn.Module, case: Case, folder: Path) -> nn.Module:
    """What was written for `model`, a text model taken from a file of a whole one: by its own class, for the auto class knows
    not every such text model."""
    return type(model).from_pretrained(folder, dtype=torch.float32).eval() if case.saved_by else load(case, folder)


def inputs(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Token ids that end in an end of sequence, and labels."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCABULARY // 2, (ROWS, special(case.task, case.model_type).length), generator=generator)
    ids[:, -1] = EOS
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.task == "classification":
        made["labels"] = torch.arange(ROWS) % 2
    elif case.task == "seq2seq-lm" and getattr(model.config, "is_encoder_decoder", False):
        made["labels"] = torch.randint(3, VOCABULARY // 2, (ROWS, 5), generator=generator)
        made["decoder_input_ids"] = torch.randint(3, VOCABULARY // 2, (ROWS, 5), generator=generator)
    else:
        made["labels"] = ids.clone()
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {name: value for name, value in made.items() if name in accepted or (open_ended and name != "labels")}


def run(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the loss: the model's own where it has one for labels, else a fixed sum of the logits."""
    torch.manual_seed(3)
    output = model(**given)
    loss = output.get("loss")
    if loss is None:
        logits = output.logits.float()
        factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        loss = (logits * factors).mean()
    return output.logits, loss


@contextmanager
def calls(model: nn.Module) -> Iterator[set[str]]:
    """The names of the linear layers that are called meanwhile."""
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in linear_names(model)
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of transformers' model, these layers' weights (as nn.Linear holds them) put in; each layer has its own."""
    made = copy.deepcopy(model)
    for name, weight in weights.items():
        if weight.dim() == 3:  # a stack of experts, by its own name
            owner, _, own = name.rpartition(".")
            setattr(made.get_submodule(owner), own, nn.Parameter(weight.clone()))
        else:
            made.get_submodule(name).weight = nn.Parameter(weight.clone())
    return made


def transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def linear_names(model: nn.Module) -> list[str]:
    """Every layer that holds a matrix and is a linear layer by class."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or transposed(m)]


def relative(ours: Tensor, right: Tensor) -> float:
    """The largest difference, in units of the largest right value; infinite for other shapes and for a NaN of ours alone."""
    if ours.shape != right.shape:
        return float("inf")
    ours, right = ours.detach().double(), right.detach().double()
    if not torch.equal(torch.isfinite(ours), torch.isfinite(right)):
        return float("inf")
    known = torch.isfinite(right)
    if not known.any():
        return float("inf")
    return float((ours - right)[known].abs().max() / right[known].abs().max().clamp(min=1e-6))


def own_tensors(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer by every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
