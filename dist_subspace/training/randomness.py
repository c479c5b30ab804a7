"""Randomness as a function: what is drawn in a micro-batch depends on the seed and the micro-batch's number alone."""

from __future__ import annotations

import hashlib

import torch


def seed_micro_batch(seed: int, number: int) -> None:
    """Seed every generator of this process for one micro-batch: dropout, the base model's own included, is then the same
    on whichever rank it runs, and after any number of interruptions. Activation checkpointing keeps the state for its
    second draw by itself."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
