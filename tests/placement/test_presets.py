"""Presets that DeepSpeed accepts, stock configurations that agree with the YAML, and combinations that are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_subspace.errors import UsageError
from dist_subspace.placement.presets import (
    PRESETS,
    Facts,
    check_supported,
    deepspeed_config,
    read_deepspeed,
    resolve_stock,
    stock_config,
    stock_training_keys,
    zero_stage,
)

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


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, as DeepSpeed's configuration asks for the number of ranks."""
    import deepspeed

    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, value)
    if dist.is_initialized():
        yield
        return
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def preset(name: str, **changes: Any) -> dict[str, Any]:
    nvme = "fast" if name == "zero3-nvme" else None
    given = {"micro_batch": 2, "rounds": 3, "world_size": 1, "max_grad_norm": 1.0, "nvme_path": nvme}
    return deepspeed_config(name, **(given | changes))


def refused(config: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_supported(config, **({"storage": "nf4", "dtype": "bfloat16"} | changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contradicted(changes: dict[str, Any], facts: Facts = FACTS) -> str:
    with pytest.raises(UsageError) as caught:
        stock_config(changes, facts)
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_deepspeed_accepts_every_preset(name: str, alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    accepted = DeepSpeedConfig(preset(name, trainable_numel=1000, block_numel=70_000))
    assert accepted.zero_config.stage == PRESETS[name] == zero_stage(preset(name))
    assert not accepted.bfloat16_config.enabled and not accepted.float16_config.enabled
    assert (accepted.train_batch_size, accepted.gradient_accumulation_steps) == (6, 3)
    assert accepted.zero_allow_untested_optimizer and not accepted.zero_force_ds_cpu_optimizer
    assert accepted.gradient_clipping == 1.0
    if PRESETS[name]:
        assert accepted.zero_config.reduce_bucket_size == accepted.zero_config.allgather_bucket_size == 65536


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_supported(name: str) -> None:
    check_supported(preset(name), storage="nf4", dtype="bfloat16")


@pytest.mark.parametrize("name", ["zero3", "zero3-offload", "zero3-nvme"])
def test_stage_3_keeps_no_weight_whole_and_holds_two_blocks_at_most(name: str, alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = DeepSpeedConfig(preset(name, block_numel=70_000)).zero_config
    assert zero.param_persistence_threshold == 0
    assert zero.prefetch_bucket_size <= 70_000
    assert (zero.max_live_parameters, zero.max_reuse_distance) == (140_000, 70_000)


@pytest.mark.parametrize(("trained", "bucket"), [(0, 65536), (65537, 131072), (10**7, 10027008), (10**10, 5 * 10**8)])
def test_buckets_are_sized_by_what_is_trained(trained: int, bucket: int) -> None:
    zero = preset("zero2", trainable_numel=trained)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket


def test_offload_goes_where_the_preset_says() -> None:
    two, three, nvme = (preset(n)["zero_optimization"] for n in ("zero2-offload", "zero3-offload", "zero3-nvme"))
    assert two["offload_optimizer"]["device"] == "cpu" and "offload_param" not in two
    assert three["offload_param"]["device"] == "cpu"
    assert (nvme["offload_param"]["device"], nvme["offload_param"]["nvme_path"]) == ("nvme", "fast")
    assert nvme["offload_param"]["max_in_cpu"] == 0  # else the weights would stay in CPU memory


def test_the_engines_batch_counts_empty_micro_batches() -> None:
    config = preset("zero1", micro_batch=2, rounds=2, world_size=3)
    assert config["train_batch_size"] == 12  # for a global batch of 10: 2 + 2 + 1 micro-batches


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"deepspeed\.preset is 'zero4'.*zero0, zero1, zero2, zero3"):
        preset("zero4")
    with pytest.raises(UsageError, match=r"deepspeed\.nvme_path is null"):
        preset("zero3-nvme", nvme_path=None)


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
    with pytest.raises(UsageError, match=r"optimizer\.type is 'OneBitAdam'.*accepted: adam, adamw"):
        stock_training_keys({"optimizer": {"type": "OneBitAdam"}})


def test_a_setting_that_nobody_would_read_is_refused() -> None:
    assert "optimizer.params.freeze_step is 5" in contradicted({"optimizer": {"params": {"freeze_step": 5}}})
    assert 'prescale_gradients is "auto"' in contradicted({"prescale_gradients": "auto"})
    assert "zero_optimization.stage is 4; accepted: 0, 1, 2, 3" in contradicted({"zero_optimization": {"stage": 4}})
    assert "fp16 is True; accepted: a mapping" in contradicted({"fp16": True})


def test_thresholds_that_a_stock_configuration_leaves_open_are_the_presets() -> None:
    zero = stock_config({"zero_optimization": {"stage": 3}}, FACTS)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0 and zero["reduce_bucket_size"] == 131072
    kept = stock_config({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, FACTS)["zero_optimization"]
    assert kept["reduce_bucket_size"] == 7


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


def test_row_19_deepcompile_with_frozen_parameters_at_stage_3_is_refused() -> None:
    config = preset("zero3") | {"compile": {"deepcompile": True}}
    assert "compile.deepcompile is true at ZeRO stage 3" in refused(config)
    check_supported(preset("zero3") | {"compile": {"deepcompile": False}}, storage="nf4", dtype="bfloat16")


def test_row_25_quantised_initialisation_is_refused() -> None:
    config = preset("zero3") | {"weight_quantization": {"quantized_initialization": {"num_bits": 4, "group_size": 64}}}
    assert "weight_quantization.quantized_initialization is set" in refused(config)


@pytest.mark.parametrize(
    "key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"]
)
def test_row_26_quantised_zero_traffic_is_refused(key: str) -> None:
    config = preset("zero3")
    config["zero_optimization"][key] = True
    assert f"zero_optimization.{key} is true, but it dequantises to float16" in refused(config, storage="bf16")
    assert "packed bytes of storage nf4" in refused(config, dtype="float16")
    check_supported(config, storage="fp16", dtype="float16")


@pytest.mark.parametrize("quant_storage", ["float32", "float16", "torch.float16"])
def test_row_29_packed_bytes_in_a_float_type_are_refused_under_a_bf16_engine(quant_storage: str) -> None:
    engine = preset("zero2") | {"bf16": {"enabled": True}}
    assert "bnb_4bit_quant_storage is" in refused(engine, quant_storage=quant_storage)
    for harmless in ("uint8", "bfloat16", None):
        check_supported(engine, storage="nf4", dtype="bfloat16", quant_storage=harmless)
    check_supported(preset("zero2"), storage="nf4", dtype="bfloat16", quant_storage=quant_storage)


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"fp16": {"enabled": True}}, "bfloat16", "fp16.enabled is true, but model.dtype is bfloat16"),
        ({"bf16": {"enabled": True}}, "float16", "bf16.enabled is true, but model.dtype is float16"),
        ({"bf16": {"enabled": True}}, "float32", "bf16.enabled is true, but model.dtype is float32"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16", "both true"),
        ({"tensor_parallel": {"autotp_size": 2}}, "bfloat16", "tensor_parallel.autotp_size is 2"),
    ],
)
def test_an_engine_that_contradicts_the_model_is_refused(changes: dict[str, Any], dtype: str, reason: str) -> None:
    assert reason in refused(preset("zero2") | changes, dtype=dtype)


def test_a_matching_16_bit_engine_is_supported() -> None:
    check_supported(preset("zero2") | {"bf16": {"enabled": True}}, storage="bf16", dtype="bfloat16")
    check_supported(preset("zero2") | {"fp16": {"enabled": True}}, storage="nf4", dtype="float16")


@pytest.mark.parametrize(
    ("zero", "reason"),
    [
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "offload_param.device is 'cpu' at stage 2; accepted: stage 3",
        ),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "at stage 0; accepted: stage 1 or above"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.nvme_path is missing"),
        ({"stage": 3, "offload_param": {"device": "disk"}}, "accepted: none, cpu, nvme"),
    ],
)
def test_an_offload_that_cannot_be_is_refused(zero: dict[str, Any], reason: str) -> None:
    assert reason in refused({"zero_optimization": zero})
    check_supported(
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "none"}}}, storage="nf4", dtype="bfloat16"
    )
