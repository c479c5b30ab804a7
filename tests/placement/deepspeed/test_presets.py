"""Presets that DeepSpeed accepts, and combinations that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed import supported
from dist_subspace.placement.deepspeed.json_file import zero_stage
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.storage import storage_info


def check_supported(config: dict[str, Any], *, storage: str, **facts: Any) -> None:
    supported.check_supported(config, storage=storage, unquantised=storage_info(storage).dtype is not None, **facts)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    nvme = "fast" if name == "zero3-nvme" else None
    given = {"micro_batch": 2, "rounds": 3, "world_size": 1, "max_grad_norm": 1.0, "nvme_path": nvme}
    given |= {"ranks_per_node": 8} if name == "zero3-hpz" else {}
    return deepspeed_config(name, **(given | changes))


def refused(config: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_supported(config, **({"storage": "nf4", "dtype": "bfloat16"} | changes))
    assert "\n" not in str(caught.value)
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
    assert accepted.steps_per_print > 10**9 and not accepted.wall_clock_breakdown, "nothing is printed, nothing waits"
    assert accepted.zero_config.overlap_comm == (PRESETS[name] == 3), (
        "below, the buckets of an adapter would be doubled"
    )
    if PRESETS[name]:
        assert accepted.zero_config.reduce_bucket_size == accepted.zero_config.allgather_bucket_size == 65536


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_supported(name: str) -> None:
    check_supported(preset(name), storage="bf16" if name == "zero3-nvme" else "nf4", dtype="bfloat16")


@pytest.mark.parametrize("name", ["zero3", "zero3-hpz", "zero3-offload", "zero3-nvme"])
def test_stage_3_keeps_no_weight_whole_and_holds_two_blocks_at_most(name: str, alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = DeepSpeedConfig(preset(name, block_numel=70_000)).zero_config
    assert zero.param_persistence_threshold == 0
    assert zero.prefetch_bucket_size == 70_000
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


@pytest.mark.parametrize(("block", "elements"), [(70_000, 10**8), (3 * 10**8, 3 * 10**8)])
def test_the_buffer_of_the_nvme_swapper_takes_the_largest_block(block: int, elements: int, alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = DeepSpeedConfig(preset("zero3-nvme", block_numel=block)).zero_config
    assert zero.offload_param is not None and zero.offload_param.buffer_size == elements


def test_the_engines_batch_counts_empty_micro_batches() -> None:
    config = preset("zero1", micro_batch=2, rounds=2, world_size=3)
    assert config["train_batch_size"] == 12  # for a global batch of 10: 2 + 2 + 1 micro-batches


def test_second_shards_are_split_over_the_ranks_of_a_node_and_kept_where_they_are_asked_for_alone(alone: None) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    sizes = {name: DeepSpeedConfig(preset(name)).zero_config.zero_hpz_partition_size for name in PRESETS}
    assert sizes == {name: 8 if name == "zero3-hpz" else 1 for name in PRESETS}
    with pytest.raises(UsageError, match="zero3-hpz', which needs the number of ranks of a node"):
        preset("zero3-hpz", ranks_per_node=None)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"deepspeed\.preset is 'zero4'.*zero0, zero1, zero2, zero3"):
        preset("zero4")


def test_deepcompile_with_frozen_parameters_at_stage_3_is_refused() -> None:
    config = preset("zero3") | {"compile": {"deepcompile": True}}
    assert "compile.deepcompile is true at ZeRO stage 3" in refused(config)
    check_supported(preset("zero3") | {"compile": {"deepcompile": False}}, storage="nf4", dtype="bfloat16")


@pytest.mark.parametrize("key", ["quantized_initialization", "post_init_quant"])
def test_quantised_initialisation_is_refused(key: str) -> None:
    config = preset("zero3") | {"weight_quantization": {key: {"num_bits": 4, "group_size": 64}}}
    assert f"weight_quantization.{key} is set" in refused(config)


@pytest.mark.parametrize(
    "key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"]
)
def test_quantised_zero_traffic_is_refused(key: str) -> None:
    config = preset("zero3")
    config["zero_optimization"][key] = True
    assert f"zero_optimization.{key} is true, but it dequantises to float16" in refused(config, storage="bf16")
    assert "packed bytes of storage nf4" in refused(config, dtype="float16")
    check_supported(config, storage="fp16", dtype="float16")


@pytest.mark.parametrize("quant_storage", ["float32", "float16", "torch.float16"])
def test_packed_bytes_in_a_float_type_are_refused_under_a_bf16_engine(quant_storage: str) -> None:
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
        ({"bfloat16": {"enabled": True}}, "float16", "bfloat16.enabled is true, but model.dtype is float16"),
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
        ({"stage": 3, "offload_param": "nvme"}, "zero_optimization.offload_param is 'nvme'; accepted: a mapping"),
        ({"stage": 1, "offload_optimizer": "cpu"}, "zero_optimization.offload_optimizer is 'cpu'; accepted: a mapping"),
    ],
)
def test_an_offload_that_cannot_be_is_refused(zero: dict[str, Any], reason: str) -> None:
    assert reason in refused({"zero_optimization": zero})
    check_supported(
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "none"}}}, storage="nf4", dtype="bfloat16"
    )


def test_packed_bytes_are_not_swapped_to_nvme() -> None:
    assert "one type for all its buffers" in refused(preset("zero3-nvme"), storage="int8")
