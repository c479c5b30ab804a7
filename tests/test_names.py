"""The public names, written down once by hand: a test whose cases are generated from a registry passes when an entry is lost."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

import pytest
import torch
import transformers
from typer.testing import CliRunner

import dist_subspace
from dist_subspace import cli
from dist_subspace.config import names
from dist_subspace.config.schema import Config
from dist_subspace.families import classes
from dist_subspace.loading.load import DTYPES
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.storage import pack, storages
from dist_subspace.subspace.core.constraints import CONSTRAINTS
from dist_subspace.training import optimizers, trackers
from dist_subspace.training.data.formats import FORMATS
from tests.step_records import step_record

METHODS = (
    *("lora", "rslora", "dora", "pissa", "milora", "olora", "lora-fa", "trilora", "adalora", "flora", "moslora"),
    *("liera", "flexlora", "ssl", "ssb", "ia3", "bitfit", "sam-parser", "svdiff", "spectral-additive"),
    *("spectral-rotational", "lora-dash", "parallel-adapter", "houlsby", "pfeiffer", "prefix", "prompt", "p-tuning"),
    *("vera", "lora-xs", "miss", "oft"),
)
# rank and alpha over rank of the method itself; None where it has none (docs/methods.md, "Defaults of a method").
DEFAULTS: dict[str, tuple[int | None, float | None]] = {
    **dict.fromkeys(
        ("lora", "rslora", "lora-fa", "dora", "trilora", "flora", "moslora", "liera", "lora-dash"), (16, 2)
    ),
    **dict.fromkeys(("pissa", "milora", "olora", "lora-xs"), (16, 1)),
    **dict.fromkeys(("spectral-rotational", "parallel-adapter"), (16, None)),
    **dict.fromkeys(("houlsby", "pfeiffer"), (64, None)),
    **dict.fromkeys(
        ("ssl", "ssb", "ia3", "bitfit", "sam-parser", "svdiff", "prefix", "prompt", "p-tuning", "oft"), (None, None)
    ),
    **{"adalora": (8, None), "flexlora": (8, 2), "spectral-additive": (8, None), "vera": (256, None)},
    "miss": (64, None),
}
NOT_MERGEABLE = {"parallel-adapter", "houlsby", "pfeiffer", "prefix", "prompt", "p-tuning"}
PEFTS = {
    **{"lora": "LORA", "rslora": "LORA", "lora-fa": "LORA", "dora": "LORA", "adalora": "ADALORA", "ia3": "IA3"},
    **{"vera": "VERA", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING"},
    **{"miss": "MISS", "oft": "OFT"},
}
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "nf4": 4, "fp4": 4, "int8": 8, "fp8": 8}
STAGES = {
    "zero0": 0,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "zero3-hpz": 3,
    "zero2-offload": 2,
    "zero3-offload": 3,
    "zero3-nvme": 3,
}
STAGES_ALONE = ("zero0", "zero1", "zero2", "zero3", "zero3-hpz")
ON_ANY_DEVICE = {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"}
ON_CUDA = {
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit"),
}
SCHEDULERS = {
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
}
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "base": "AutoModel",
}
EXPORTS = {
    *("MethodInfo", "SubspaceConfig", "advance", "attach", "disabled", "export_peft", "import_peft", "load_adapter"),
    *("load_frozen", "merge", "methods", "parameter_groups", "save_adapter", "summary", "trainable_parameters"),
    *("combine_adapters", "find_learning_rate", "generate", "load", "switch_adapter", "train", "TrainerMixin"),
}
COMMANDS = {
    *("train", "generate", "methods", "inspect", "merge", "export", "import", "eval", "report", "schema", "doctor"),
    *("preview", "prepare", "push", "find-lr"),
}
TRACKERS = {"tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"}
LINE = (
    *("step", "epoch", "samples", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"),
    *("peak_memory_bytes", "elapsed_seconds"),
)
KEYS = {
    "model": "path task storage double_quant dtype attn_implementation tokenizer new_tokens trust_remote_code",
    "subspace": "method rank alpha dropout target_modules exclude_modules modules_to_save constraint constraint_weight options "
    "rank_pattern alpha_pattern init_from",
    "training": "max_steps num_train_epochs global_batch_size per_device_train_batch_size per_device_eval_batch_size optim "
    "adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay "
    "max_grad_norm seed gradient_checkpointing gradient_checkpointing_kwargs on_nonfinite max_time rank_timeout"
    " full_determinism objective preference",
    "deepspeed": "preset config nvme_path",
    "checkpoint": "save_steps save_total_limit resume metric_for_best_model greater_is_better allow_different",
    "run": "output_dir logging_steps eval_steps report_to push_to_hub hub_private_repo",
}


def test_the_methods_are_these_with_the_defaults_of_their_cards() -> None:
    found = dist_subspace.methods()
    assert len(METHODS) == 32 and set(found) == set(METHODS) == set(DEFAULTS)
    assert {name: (info.rank, info.alpha_over_rank) for name, info in found.items()} == DEFAULTS
    assert {name for name, info in found.items() if not info.mergeable} == NOT_MERGEABLE
    assert {name: info.peft_type for name, info in found.items() if info.peft_type} == PEFTS


def test_the_storages_are_these_and_bf16_and_fp16_hold_their_own_type() -> None:
    assert {name: info.bits for name, info in storages().items()} == BITS
    floats = {name: info.dtype for name, info in storages().items() if info.dtype is not None}
    assert floats == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert all(pack(torch.randn(4, 6), name).storage == name for name in BITS)
    assert DTYPES.keys() == set(get_args(names.Dtype)) == {"float32", "bfloat16", "float16"}


def test_the_presets_are_these_and_have_their_stage() -> None:
    assert PRESETS == STAGES and set(get_args(names.Preset)) == {"none", *STAGES}
    for preset, stage in STAGES.items():
        config = deepspeed_config(
            preset, micro_batch=1, rounds=1, world_size=1, max_grad_norm=1.0, nvme_path="/somewhere", ranks_per_node=8
        )
        zero = config["zero_optimization"]
        assert zero["stage"] == stage, preset
        devices = {zero[key]["device"] for key in zero if key.startswith("offload")}
        assert ("nvme" in devices) == ("nvme" in preset) and bool(devices) == (preset not in STAGES_ALONE), preset


def test_the_optimizers_are_these_by_transformers_names() -> None:
    assert optimizers.ON_ANY_DEVICE.keys() == ON_ANY_DEVICE and optimizers.ON_CUDA.keys() == ON_CUDA
    assert set(get_args(names.Optimizer)) == ON_ANY_DEVICE | ON_CUDA
    known = {name.value for name in transformers.training_args.OptimizerNames}
    assert not (ON_ANY_DEVICE | ON_CUDA) - known


def test_the_schedules_are_these_by_transformers_names() -> None:
    assert set(get_args(names.Scheduler)) == SCHEDULERS <= {kind.value for kind in transformers.SchedulerType}


def test_tasks_formats_trackers_constraints_and_choices_are_these() -> None:
    assert dict(classes.AUTO_CLASSES) == AUTO_CLASSES and all(
        hasattr(transformers, name) for name in AUTO_CLASSES.values()
    )
    assert set(get_args(names.Task)) == {"causal-lm", "classification"}
    formats = ["alpaca", "chat", "completion", "text", "classification"]
    formats += ["preference", "chat-preference", "unpaired-preference", "chat-unpaired-preference"]
    assert set(FORMATS) == set(formats) == set(get_args(names.Format))
    assert get_args(names.Objective) == ("sft", "dpo", "kto", "orpo")
    assert trackers.KINDS.keys() == set(get_args(names.Reporter)) == TRACKERS
    assert set(CONSTRAINTS) == set(get_args(names.Constraint)) == {"none", "mpc_o", "mpc_d", "mpc_n"}
    assert get_args(names.Truncation) == ("turns", "tokens") and get_args(names.OnNonfinite) == ("skip", "stop")
    assert get_args(names.Difference) == ("model", "method", "data")


def test_the_packages_public_names_are_these_and_each_is_there() -> None:
    assert set(dist_subspace.__all__) == EXPORTS
    for name in EXPORTS:
        assert getattr(dist_subspace, name).__name__ == name
    assert {"storage", "double_quant", "deepspeed", "task", "dtype"} <= parameters(dist_subspace.load_frozen)


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_commands_are_these_and_each_explains_itself() -> None:
    assert {c.name or c.callback.__name__ for c in cli.app.registered_commands} == COMMANDS  # type: ignore[union-attr]
    for name in sorted(COMMANDS):
        result = CliRunner().invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output, name


def test_a_line_of_metrics_has_these_keys() -> None:
    assert tuple(step_record(1).as_line()) == LINE and tuple(step_record(1, penalty=1.0).as_line()) == (
        *LINE,
        "penalty",
    )


@pytest.mark.parametrize("section", KEYS)
def test_the_configuration_has_these_keys(section: str) -> None:
    """An old configuration, or another tool's names, must go on to be understood: a key may come, none may go."""
    kind = Config.model_fields[section].annotation
    assert set(KEYS[section].split()) <= kind.model_fields.keys(), section  # type: ignore[union-attr]
    assert set(Config.model_fields) >= {*KEYS, "data"}


def test_the_schema_for_editors_names_every_choice() -> None:
    shown = json.loads(CliRunner().invoke(cli.app, ["schema"]).output)
    choices = {tuple(sorted(one["enum"])) for one in _nodes(shown) if "enum" in one}
    for expected in (BITS, ["none", *STAGES], ON_ANY_DEVICE | ON_CUDA, SCHEDULERS):
        assert tuple(sorted(expected)) in choices


def _nodes(node: Any) -> list[dict[str, Any]]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [*([node] if isinstance(node, dict) else []), *(found for child in children for found in _nodes(child))]
