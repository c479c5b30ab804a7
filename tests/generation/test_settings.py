"""The settings of GenerationConfig: the model's own defaults, what is given, and where an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from dist_subspace.errors import UsageError
from dist_subspace.generation.settings import NEW_TOKENS, end_ids, generation_settings, greedy
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5], "max_new_tokens": 40}
    model.generation_config = transformers.GenerationConfig(**own)
    return model


def test_the_models_own_defaults_hold_and_its_ends_and_the_trainings_end_an_answer(model: Any) -> None:
    made = generation_settings(model, stops=[7, 2])
    assert (made.do_sample, made.temperature, made.top_p, made.max_new_tokens) == (True, 0.6, 0.9, 40)
    assert end_ids(made) == {2, 5, 7} and made.pad_token_id in end_ids(made)
    assert model.generation_config.eos_token_id == [2, 5], "the model's own are as they were"
    assert generation_settings(model, [7], {"eos_token_id": 9}).eos_token_id == 9
    model_without = tiny_model()
    assert generation_settings(model_without).max_new_tokens == NEW_TOKENS


def test_a_temperature_draws_and_zero_is_greedy_without_the_models_ways_to_draw(model: Any) -> None:
    for given in ({"temperature": 0}, {"do_sample": False}):
        made = generation_settings(model, given=given)
        assert (made.do_sample, made.temperature, made.top_p) == (False, None, None)
    assert not greedy(model).do_sample and greedy(model, max_new_tokens=3).max_new_tokens == 3
    plain = tiny_model()
    assert generation_settings(plain, given={"top_p": 0.5}).do_sample is True
    assert not generation_settings(plain).do_sample


def test_a_folders_settings_stand_in_the_place_of_the_models(model: Any, tmp_path: Path) -> None:
    transformers.GenerationConfig(num_beams=3, max_new_tokens=11).save_pretrained(tmp_path)
    made = generation_settings(model, folder=tmp_path)
    assert (made.num_beams, made.max_new_tokens) == (3, 11) and made.do_sample is not True
    with pytest.raises(UsageError, match=r"accepted: a folder with generation_config\.json"):
        generation_settings(model, folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temprature": 1.0}, r"a generation setting is 'temprature' \(did you mean 'temperature'\?\)"),
        ({"temperature": -1.0}, r"temperature is -1.0; accepted: a number of at least 0"),
        ({"top_p": 1.5}, r"top_p is 1.5; accepted"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; accepted"),
        ({"num_beams": 1.5}, r"num_beams is 1.5; accepted"),
        ({"max_length": 9}, r"max_length is 9: it counts the prompt too.*max_new_tokens"),
        ({"num_return_sequences": 2}, r"a prompt has one answer"),
        ({"do_sample": False, "top_k": 5}, r"do_sample is False and top_k is 5"),
        ({"early_stopping": "soon"}, r"transformers refuses the generation settings: .*early_stopping"),
    ],
)
def test_what_cannot_hold_is_refused_in_a_sentence(model: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        generation_settings(model, given=given)
