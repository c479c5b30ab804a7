"""The tensors of one micro-batch, and what preferences say beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs at once: b rows of t tokens, on the CPU. All tensors are int64 unless said otherwise."""

    number: int
    """Of this micro-batch in the whole run, over all ranks; seeds dropout."""
    inputs: dict[str, Any]
    """input_ids (b, t); position_ids (b, t), from 0 in each sample (causal-lm); attention_mask (b, t) (not packed).
    Packed for a kernel that takes lengths: cu_seq_lens_q, cu_seq_lens_k (segments + 1,) int32 over the flattened
    rows, and the integers max_length_q, max_length_k."""
    labels: Tensor
    """(b, t) with -100 off target and at each sample's first token; or (b,) class ids."""
    targets: int
    """Labels that are not -100 (classification: samples)."""
    samples: int
    tokens: int
    """Without padding."""
    preferences: Preferences | None = None
    """Of answers that are preferred to others."""

    @property
    def terms(self) -> int:
        """What its loss is a sum over: targets, or pairs and answers that are preferred."""
        return self.targets if self.preferences is None else self.samples


@dataclass(frozen=True)
class Preferences:
    """What a micro-batch of preferences says beside its tokens. Of n pairs, its b rows are the n chosen, then the n rejected."""

    completions: Tensor
    """(b, t) int64: 1 at the tokens of answers."""
    chosen_tokens: int
    """Tokens of the chosen texts that are predicted, prompts among them."""
    desirable: Tensor | None = None
    """(b,) bool, of single answers."""
    mismatched: MicroBatch | None = None
    """The prompts of single answers, each with another one's answer."""
