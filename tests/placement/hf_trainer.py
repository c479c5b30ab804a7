"""What a run of transformers' Trainer on a tiny model needs."""

from __future__ import annotations

from typing import Any

import torch

from tests.matrix import tiny

ROWS = 32


def stock(stage: int) -> dict[str, Any]:
    """A configuration as people write it, with its "auto" values; the thresholds fit a tiny model."""
    thresholds = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "prefetch_bucket_size")}
    limits = {f"stage3_{name}": 0 for name in ("max_live_parameters", "max_reuse_distance")}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(thresholds | limits if stage == 3 else {})},
    }


def arguments(folder: str, stage: int | None, checkpointing: bool) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        deepspeed=None if stage is None else stock(stage),
        use_cpu=True,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        seed=3,
    )


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards: what three steps can begin to learn."""
    starts = torch.arange(ROWS) % 5 + 3
    ids = (starts[:, None] + torch.arange(tiny.LENGTH)) % (tiny.VOCABULARY - 3) + 3
    return [{"input_ids": row, "labels": row} for row in ids]


def forget_earlier_trainers() -> None:
    """accelerate and transformers keep the first Trainer's DeepSpeed state for the whole process."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
