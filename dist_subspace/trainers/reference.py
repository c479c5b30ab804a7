"""The reference of preference losses: the model itself with its adapter off, where a trainer would load a second one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, disabled


class Reference:
    """Called as the model is, it computes what the frozen base computes. It is no module: it has no weights of its own, and no
    engine is made around it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self.model):
            return self.model(*args, **kwargs)


class ReferenceChoice:
    """Where a TRL trainer looks for its reference: `ref_model`.

    TRL (1.16.0, `DPOTrainer.__init__`) loads the base a second time where it is given none and the model is not PEFT's; what it
    is given it takes for a model, and makes an engine around it. So it is given a `Reference`, and while the trainer is made
    there is none to be seen.
    """

    _given: Reference | None = None
    _reference: Reference | None = None

    @property
    def ref_model(self) -> Reference | None:
        return self._reference

    @ref_model.setter
    def ref_model(self, chosen: Reference | None) -> None:
        if chosen is not None and not isinstance(chosen, Reference):
            raise UsageError(
                f"{type(self).__name__} made a second model of class {type(chosen).__name__} its reference, which is this model "
                "with its adapter off; accepted: the versions of TRL that dist_subspace was tested with (1.16)"
            )
        if chosen is not None:
            self._given = chosen

    def reference_is_chosen(self) -> None:
        """The trainer is made: from now on its reference is seen."""
        self._reference = self._given

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """TRL's, of the base. Before the training an adapter that was loaded counts too: the reference is the policy that the
        training begins with.

        Raises:
            UsageError: for such an adapter, once it has been trained.
        """
        own: nn.Module = self.model  # type: ignore[attr-defined]
        loaded = bool(attached(own).loaded)
        if loaded and self.state.global_step > 0:  # type: ignore[attr-defined]
            raise UsageError(
                "the reference of these samples is the adapter as it was loaded, which has been trained since; accepted: these "
                "samples as eval_dataset of the trainer"
            )
        with nullcontext() if loaded else disabled(own):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
