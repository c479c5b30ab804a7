"""`TrainerMixin`: what Hugging Face's Trainer and TRL's trainers need to know of a model with a subspace method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import save_adapter
from dist_subspace.subspace import attached, parameter_groups
from dist_subspace.trainers.callback import ScheduleCallback
from dist_subspace.trainers.card import write_card
from dist_subspace.trainers.dropout import without_dropout
from dist_subspace.trainers.reference import Reference, ReferenceChoice
from dist_subspace.trainers.refusals import check_arguments, check_trainer, takes_reference
from dist_subspace.trainers.state import save_state
from dist_subspace.trainers.trainer_internals import CheckpointSteps

if TYPE_CHECKING:
    from torch import nn


class TrainerMixin(ReferenceChoice, CheckpointSteps):
    """Stands before a trainer: `class MyTrainer(dist_subspace.TrainerMixin, SFTTrainer)`, with nothing in it.

    It goes with Hugging Face's `Trainer` and what is made from it, and with TRL's `SFTTrainer`, `DPOTrainer`, `KTOTrainer` and
    `RewardTrainer`, each with DeepSpeed or without. The model is one that `attach`, `load_adapter` or `import_peft` returned.

    * Checkpoints and `save_model` hold the adapter alone, which `load_adapter` reads; every rank calls them.
    * `train(resume_from_checkpoint=True)` and `load_best_model_at_end` read such checkpoints; a resumed run goes on to the bit.
    * The optimizer is given `parameter_groups` (LoRA+, no weight decay of one-dimensional parameters).
    * The method's schedule advances (AdaLoRA, FlexLoRA, LoRA-Dash), and a constraint's penalty has the loss's weight.
    * The reference of `DPOTrainer` and `KTOTrainer` is this model with its adapter off, and no second model is loaded.

    Raises:
        UsageError: for a model without a method, and for arguments with which something of this would not hold.
    """

    optimizer: torch.optim.Optimizer | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_trainer(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _by_name(super().__init__, args, kwargs)
        model = given.get("model")
        check_arguments(type(self), given)
        if takes_reference(type(self)):
            given["ref_model"] = Reference(model)  # type: ignore[arg-type]
        super().__init__(**given)
        self.reference_is_chosen()
        if getattr(self.args, "disable_dropout", False):
            without_dropout(self.model)
        self.add_callback(ScheduleCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the method's groups of parameters.

        Raises:
            UsageError: an optimizer that makes its groups itself (GaLore, LOMO).
        """
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            own = {"params", "model", "optimizer_dict"} & set(options)
            if own or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise UsageError(
                    f"optim is {str(self.args.optim)!r}, which chooses its parameters itself; accepted: an optimizer that takes "
                    "the method's groups of parameters, such as adamw_torch"
                )
            self.optimizer = kind(
                parameter_groups(self.model, self.args.learning_rate, self.args.weight_decay), **options
            )
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss; the gradient that reaches it tells how much of the step it is."""
        accumulation = attached(self.model).accumulation
        with accumulation.heard_outside():
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not (torch.is_grad_enabled() and self.model.training):
            return result
        part = 1 / self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else 1.0
        loss = accumulation.probe(result[0] if return_outputs else result, part)
        return (loss, result[1]) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the losses of a step's micro-batches add up to the step's, as `Trainer.training_step` decides it."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or self.compute_loss_func is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Collective: write the adapter, the tokenizer and the training arguments; rank 0 alone writes."""
        folder = Path(output_dir or self.args.output_dir)
        processing = self.processing_class
        save_adapter(
            self.model, folder, tokenizer=processing if isinstance(processing, PreTrainedTokenizerBase) else None
        )
        if self.is_writing_checkpoint:
            save_state(self.model, folder)
        if self.args.should_save:
            if processing is not None and not isinstance(processing, PreTrainedTokenizerBase):
                processing.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **known: Any,
    ) -> None:
        """The adapter's card, in the output folder; a card that a person has edited stays.

        Arguments:
            known: what else Trainer's own method takes; of it `license` and `dataset` are written.
        """
        if self.is_world_process_zero():
            write_card(self, model_name, dataset_name or known.get("dataset"), tags, known.get("license"))


def _by_name(init: Callable[..., None], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, as far as they are given."""
    signature = inspect.signature(init)
    bound = signature.bind_partial(*args, **kwargs).arguments
    further = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = {name: value for name, value in bound.items() if name not in further}
    return named | {key: value for name in further for key, value in bound.get(name, {}).items()}
