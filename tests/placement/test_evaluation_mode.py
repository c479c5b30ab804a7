"""A model that was asked is in the mode that it was in."""

from __future__ import annotations

import pytest
from torch import nn

from dist_subspace.placement.evaluation_mode import in_evaluation


def test_a_model_is_in_evaluation_within_and_as_it_was_after_even_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(KeyError), in_evaluation(model):
        assert not model.training
        raise KeyError
    assert model.training
    with in_evaluation(model.eval()):
        assert not model.training
    assert not model.training, "one that was not trained is not trained after"
