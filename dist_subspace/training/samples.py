"""`run.sample_prompts`: a few prompts that are answered at each evaluation, as the training's own format has them.

Greedy, so that what changes is the model. RUN/samples.jsonl has a line an answer; a run that goes on writes the steps after its
checkpoint again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_subspace.atomic_files import json_ready, write_text_atomic
from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import answers
from dist_subspace.generation.settings import greedy
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.data.prompting import Prompting
from dist_subspace.training.sections import data_settings

NEW_TOKENS = 64  # of an answer at most: it is a look, and the ranks wait for it
WRITING = ("causal-lm",)


@dataclass(frozen=True)
class Sample:
    """A prompt as the configuration has it, and what the model answers after so many steps."""

    step: int
    prompt: str
    answer: str
    finish_reason: str


def check_prompts(config: Config) -> None:
    """Prompts can be answered by what is trained, and there are evaluations at which they are.

    Raises:
        UsageError: they cannot, or there are none.
    """
    prompts = config.run.sample_prompts
    if not prompts:
        return
    if config.data.eval is None:
        raise UsageError(
            f"run.sample_prompts has {len(prompts)}, which are answered at each evaluation, but data.eval is null; accepted with "
            "them: data.eval as a file, or as the fraction of the training data that is held out"
        )
    if config.model.task not in WRITING:
        raise UsageError(
            f"run.sample_prompts has {len(prompts)}, but a model of model.task {config.model.task!r} writes no answers; "
            f"accepted with them: {', '.join(WRITING)}"
        )


class SamplePrompts:
    """The prompts of a run, ready to be answered."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        """Raises UsageError for a format in which no answer is written."""
        self.prompts, self.tokenizer = config.run.sample_prompts, tokenizer
        prompting = Prompting(data_settings(config.data), tokenizer)
        records = [prompting.record(prompt) for prompt in self.prompts]
        self._ids = [made.ids for made in prompting.of_records(records, "run.sample_prompts")]
        self._stops = prompting.stops()

    def answered(self, model: nn.Module, step: int) -> list[Sample]:
        """Collective: an answer to each, the same on every rank. The model's mode and torch's random state are as before."""
        made = answers(model, self.tokenizer, self._ids, greedy(model, self._stops, NEW_TOKENS))
        return [
            Sample(step, prompt, answer.text, answer.finish_reason)
            for prompt, answer in zip(self.prompts, made, strict=True)
        ]


def write_samples(run: RunFolder, samples: list[Sample]) -> None:
    """Local, rank 0: behind those of earlier steps.

    Raises:
        StorageError: the disk refuses.
    """
    first = min(sample.step for sample in samples)
    kept = [line for line in _lines(run) if line["step"] < first]
    lines = [*kept, *(vars(sample) for sample in samples)]
    write_text_atomic(run.samples, "".join(json.dumps(json_ready(line), ensure_ascii=False) + "\n" for line in lines))


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    try:
        raw = run.samples.read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, raw) if isinstance(line.get("step"), int)]
    except (OSError, ValueError, AttributeError):  # none yet, or somebody has edited it
        return []
