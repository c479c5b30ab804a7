"""TRL's own trainers with PEFT's LoRA, on the same samples in the same order, from the same adapter."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from dist_subspace.training.data.order import sample_order
from tests.keys.bench import Bench, Outcome

COUNT, BATCH, STEPS = 8, 4, 2
FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "kl")


def pairs() -> list[dict[str, Any]]:
    """The prompts begin with the tokenizer's own begin, which TRL's ORPO puts there where it is missing."""
    return [
        {"prompt": f"<s>say {n % 7} ", "chosen": f"{n % 7} " * (1 + n % 3), "rejected": f"no {n % 5}" * (1 + n % 2)}
        for n in range(COUNT)
    ]


def singles() -> list[dict[str, Any]]:
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if n % 2 else "rejected"], "label": n % 3 > 0}
        for n, pair in enumerate(pairs())
    ]


def started(bench: Bench) -> str:
    """An adapter that is no beginning of its method: the reference is the model with it."""
    folder = bench.folder / "preferring"
    if not folder.exists():
        usual = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        bench.peft_model(usual).save_pretrained(folder)
    return str(folder)


def preferring(bench: Bench, objective: str, **preference: Any) -> Outcome:
    """A run of ours."""
    form, records = ("unpaired-preference", singles()) if objective == "kto" else ("preference", pairs())
    changes = {
        "subspace.init_from": started(bench),
        "data.format": form,
        "data.train": bench.write(f"{form}.jsonl", records),
        "training.objective": objective,
        "training.preference": preference,
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": BATCH,
        "deepspeed.preset": "none",
    }
    return bench.run(changes)


def trl_lines(bench: Bench, objective: str, **preference: Any) -> list[dict[str, float]]:
    """What TRL's trainer logs of each step."""
    from datasets import Dataset

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer, settings = _classes(objective)
    records = singles() if objective == "kto" else pairs()
    ordered = [records[i] for i in sample_order([(COUNT, 1.0)], 0, 0)]
    tokenizer = bench.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        arguments = settings(
            output_dir=str(bench.folder / "trl"),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            max_length=64,
            train_sampling_strategy="sequential",
            **{"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
            **{"gradient_checkpointing": False, "optim": "adamw_torch"},
            **preference,
        )
        model = PeftModel.from_pretrained(bench.base_model(), started(bench), is_trainable=True)
        made = trainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(ordered), processing_class=tokenizer
        )
        made.train()
    return [line for line in made.state.log_history if "loss" in line]


def assert_equal(outcome: Outcome, lines: list[dict[str, float]]) -> None:
    """Losses and figures, step by step."""
    assert len(outcome.steps) == len(lines) == STEPS
    for ours, theirs in zip(outcome.steps, lines, strict=True):
        names = [name for name in FIGURES if name in theirs]
        assert {"loss", "rewards/chosen", "rewards/margins"} <= set(names)
        found, expected = ([float(line[name]) for name in names] for line in (ours, theirs))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-5, atol=2e-6, msg=str(ours))


def _classes(objective: str) -> tuple[Any, Any]:
    if objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig
