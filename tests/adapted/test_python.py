"""`load` and `generate` in a script: no launcher, no environment, twice in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.talking.folders import run_folder
from tests.tiny_models import tiny_model
from tests.tiny_run import make_tokenizer


def test_a_loaded_run_answers_as_it_was_asked_in_training_and_is_loaded_again(tmp_path: Path) -> None:
    run = run_folder(tmp_path, template="Q {instruction} A")
    model, tokenizer = dsub.load(run)
    made = dsub.generate(model, tokenizer, ["hi", {"instruction": "hi"}], max_new_tokens=6)
    bare = tokenizer("Q hi A", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([bare])
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert made == [tokenizer.decode(alone, skip_special_tokens=True)] * 2
    again, _ = dsub.load(run)
    assert dsub.generate(again, tokenizer, "hi", max_new_tokens=6) == made[:1]
    with dsub.disabled(again):
        assert dsub.generate(again, tokenizer, "hi", max_new_tokens=6) != made[:1]
    (chat,) = dsub.generate(model, tokenizer, [[{"role": "user", "content": "hi"}]], format="chat", max_new_tokens=3)
    assert isinstance(chat, str)


def test_any_model_is_asked_in_the_format_that_is_given() -> None:
    model, tokenizer = tiny_model(), make_tokenizer()
    with pytest.raises(UsageError, match="format is not given"):
        dsub.generate(model, tokenizer, "hi")
    with pytest.raises(UsageError, match="a prompt is list, and the format 'completion'"):
        dsub.generate(model, tokenizer, [[{"role": "user", "content": "hi"}]], format="completion")
