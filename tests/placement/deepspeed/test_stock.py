"""A stock DeepSpeed configuration is resolved, agrees with the YAML, or is refused with both keys and values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.json_file import read_deepspeed, zero_stage
from dist_subspace.placement.deepspeed.stock import resolve_stock, stock_config, stock_training_keys
from dist_subspace.placement.facts import Facts

FACTS = Facts(
    micro_batch=2,
    global_batch=10,
    rounds=2,
    world_size=3,
    max_grad_norm=1.0,
    learning_rate=2e-4,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    weight_decay=0.01,
    warmup_steps=0,
    total_steps=100,
    dtype="bfloat16",
    trainable_numel=100_000,
    block_numel=5000,
)
HUGGING_FACE: dict[str, Any] = {  # transformers' documentation, ds_config_zero3.json
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def contradicted(changes: dict[str, Any], facts: Facts = FACTS) -> str:
    with pytest.raises(UsageError) as caught:
        stock_config(changes, facts)
    return str(caught.value)


def test_every_auto_of_hugging_faces_configuration_is_resolved() -> None:
    config = resolve_stock(HUGGING_FACE, FACTS)
    assert "auto" not in json.dumps(config)
    assert config["optimizer"]["params"] == {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert config["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_min_lr": 0,
        "warmup_max_lr": 2e-4,
        "warmup_num_steps": 1,  # deepspeed refuses 0
    }
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 2)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (12, 1.0)
    zero = config["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (131072, 5000)
    assert (zero["stage3_param_persistence_threshold"], zero["stage3_max_reuse_distance"]) == (0, 5000)
    assert zero["stage3_max_live_parameters"] == 1e9 and config["steps_per_print"] == 2000  # what is given stays
    assert config["bf16"]["enabled"] is False and config["fp16"]["enabled"] is False
    assert HUGGING_FACE["train_batch_size"] == "auto"


def test_fp16_on_auto_follows_the_computation() -> None:
    assert resolve_stock(HUGGING_FACE, replace(FACTS, dtype="float16"))["fp16"]["enabled"] is True


def test_deepspeed_accepts_a_resolved_stock_configuration(alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    one_rank = replace(FACTS, world_size=1, rounds=5)
    assert DeepSpeedConfig(stock_config(HUGGING_FACE, one_rank)).train_batch_size == 10


def test_the_engine_gets_neither_optimizer_nor_scheduler() -> None:
    assert not {"optimizer", "scheduler"} & set(stock_config(HUGGING_FACE, FACTS))


@pytest.mark.parametrize(
    ("stock", "named"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "training.per_device_train_batch_size is 2"),
        ({"train_batch_size": 12}, "training.global_batch_size is 10"),
        ({"gradient_accumulation_steps": 4}, "training.global_batch_size is 10"),
        ({"gradient_clipping": 0.5}, "training.max_grad_norm is 1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "training.learning_rate is 0.0002"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "training.adam_beta1, training.adam_beta2 is [0.9, 0.999]"),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "training.adam_epsilon is 1e-08"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "training.weight_decay is 0.01"),
        ({"optimizer": {"type": "SGD"}}, "training.optim is 'adamw_torch'"),
        ({"scheduler": {"type": "WarmupLR"}}, "training.lr_scheduler_type is 'cosine'"),
        ({"scheduler": {"params": {"warmup_num_steps": 50}}}, "training.warmup_steps is 0"),
        ({"scheduler": {"params": {"warmup_max_lr": 1e-3}}}, "training.learning_rate is 0.0002"),
        ({"scheduler": {"params": {"total_num_steps": 7}}}, "the run's number of steps is 100"),
        ({"scheduler": {"params": {"warmup_type": "log"}}}, "the rise of every schedule is 'linear'"),
    ],
)
def test_a_contradiction_names_both_keys_and_both_values(stock: dict[str, Any], named: str) -> None:
    message = contradicted(stock, replace(FACTS, optim="adamw_torch", lr_scheduler_type="cosine"))
    (key, value), *_ = flat(stock)[-1:]
    assert message.startswith(f"deepspeed.config {key} is {value!r}, but ") and named in message


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        leaves += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def test_equal_values_do_not_contradict() -> None:
    stock = {"train_batch_size": 10, "gradient_clipping": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.0002}}}
    assert stock_config(stock, replace(FACTS, optim="adamw_torch_fused"))["train_batch_size"] == 12


def test_types_that_the_yaml_leaves_open_follow_the_stock_configuration() -> None:
    assert stock_training_keys(HUGGING_FACE) == {
        "training.optim": "adamw_torch",
        "training.lr_scheduler_type": "linear",
    }
    for rated in ({"optimizer": {"params": {"lr": 1e-3}}}, {"scheduler": {"params": {"warmup_max_lr": 1e-3}}}):
        assert stock_training_keys(rated) == {"training.learning_rate": 1e-3}
    with pytest.raises(UsageError, match=r"optimizer\.type is 'OneBitAdam'.*accepted: adam, adamw"):
        stock_training_keys({"optimizer": {"type": "OneBitAdam"}})


def test_a_setting_that_nobody_would_read_is_refused() -> None:
    assert "optimizer.params.freeze_step is 5" in contradicted({"optimizer": {"params": {"freeze_step": 5}}})
    assert 'prescale_gradients is "auto"' in contradicted({"prescale_gradients": "auto"})
    assert 'aio.block_size is "auto"' in contradicted({"aio": {"block_size": "auto"}})
    assert "zero_optimization.stage is 4; accepted: 0, 1, 2, 3" in contradicted({"zero_optimization": {"stage": 4}})
    assert "fp16 is True; accepted: a mapping" in contradicted({"fp16": True})


def test_thresholds_that_a_stock_configuration_leaves_open_are_the_presets() -> None:
    zero = stock_config({"zero_optimization": {"stage": 3}}, FACTS)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0 and zero["reduce_bucket_size"] == 131072
    kept = stock_config({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, FACTS)["zero_optimization"]
    assert kept["reduce_bucket_size"] == 7


@pytest.mark.parametrize("section", [{}, {"zero_optimization": {"overlap_comm": False}}])
def test_a_stage_that_is_not_named_is_deepspeeds_own(section: dict[str, Any], alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    assert zero_stage(section) == DeepSpeedConfig({"train_batch_size": 1, **section}).zero_config.stage == 0


def test_a_file_is_read_or_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert zero_stage(read_deepspeed(path)) == 2
    path.write_text('{\n"a": 1,\n"b" 2}')
    with pytest.raises(UsageError, match=r"ds\.json', which is not JSON at line 3"):
        read_deepspeed(path)
    path.write_text("[1]")
    with pytest.raises(UsageError, match="holds no mapping"):
        read_deepspeed(str(path))
    with pytest.raises(UsageError, match=r"gone\.json', which cannot be read \(No such file"):
        read_deepspeed(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("theirs", "params"),
    [
        ("WarmupLR", {"warmup_max_lr": 1.0}),
        ("WarmupDecayLR", {"warmup_max_lr": 1.0, "total_num_steps": 100}),
        ("WarmupCosineLR", {"total_num_steps": 100}),
    ],
)
def test_a_scheduler_of_deepspeed_is_followed_by_the_transformers_one_of_its_shape(
    theirs: str, params: dict[str, Any]
) -> None:
    from deepspeed.runtime import lr_schedules

    (name,) = stock_training_keys({"scheduler": {"type": theirs}}).values()
    own, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    scheduler = getattr(lr_schedules, theirs)(other, warmup_num_steps=10, warmup_type="linear", **params)
    ours = get_scheduler(name, own, num_warmup_steps=10, num_training_steps=100)
    for _ in range(100):  # DeepSpeed begins a step before the first, and its cosine ends a step before the last
        scheduler.step()
        assert own.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], abs=0.02)
        own.step()
        ours.step()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Adam", ["adamw_torch", "adamw_torch_fused"]),
        ("AdamW", ["adamw_torch", "adamw_torch_fused"]),
        ("SGD", ["sgd"]),
        ("Adagrad", ["adagrad"]),
        ("Lion", ["lion_32bit"]),
    ],
)
def test_an_optimizer_of_deepspeed_is_the_one_of_its_name_and_no_other(theirs: str, ours: list[str]) -> None:
    stock = {"optimizer": {"type": theirs}}
    assert stock_training_keys(stock) == {"training.optim": ours[0]}
    for name in ours:
        stock_config(stock, replace(FACTS, optim=name))
    for other in {"adamw_torch", "sgd", "adagrad", "lion_32bit", "lion_8bit", "adamw_bnb_8bit"} - set(ours):
        assert f"training.optim is {other!r}" in contradicted(stock, replace(FACTS, optim=other))


@pytest.mark.parametrize(
    ("section", "params", "named"),
    [
        ("optimizer", {"lr": 2.001e-4}, "training.learning_rate is 0.0002"),
        ("optimizer", {"betas": [0.9, 0.999, 0.9]}, "is [0.9, 0.999]"),
        ("optimizer", {"bias_correction": False}, "the bias correction of every Adam is True"),
        ("optimizer", {"adam_w_mode": False}, "the decay of weights apart from their gradient is True"),
        ("scheduler", {"warmup_min_lr": 1e-5}, "the start of every schedule is 0"),
        ("scheduler", {"warmup_min_ratio": 0.1}, "the start of every schedule is 0"),
    ],
)
def test_a_value_that_the_run_would_not_have_is_refused(section: str, params: dict[str, Any], named: str) -> None:
    assert named in contradicted({section: {"params": params}})


def test_what_the_yaml_cannot_say_may_be_said_as_it_is() -> None:
    params = {"torch_adam": True, "fused": True, "adam_w_mode": True, "bias_correction": True}
    stock_config({"optimizer": {"type": "AdamW", "params": params}}, FACTS)
    stock_config({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": "auto", "bias_correction": "auto"}}}, FACTS)
