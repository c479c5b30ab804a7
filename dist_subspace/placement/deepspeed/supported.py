"""Combinations of a DeepSpeed configuration with frozen, packed weights that are known to fail, refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.json_file import zero_stage

_ENGINE_TYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
_QUANTIZED_TRAFFIC = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_supported(
    config: Mapping[str, Any], *, storage: str, unquantised: bool, dtype: str, quant_storage: str | None = None
) -> None:
    """Refuse a configuration that would fail, or train something else, minutes later.

    Arguments:
        config: a DeepSpeed configuration without "auto" values.
        storage: how the frozen weights are held, for messages; unquantised: whether that is a type of floats.
        dtype: the computation's type: float32, bfloat16 or float16.
        quant_storage: the type of the packed bytes of a model that transformers loaded (`bnb_4bit_quant_storage`).

    Raises:
        UsageError: naming the key, its value and why.
    """
    for reason in _reasons(config, storage, unquantised, dtype, quant_storage):
        raise UsageError(reason)


def _reasons(
    config: Mapping[str, Any], storage: str, unquantised: bool, dtype: str, quant_storage: str | None
) -> Iterator[str]:
    yield from _precision(config, dtype)
    yield from _no_fp16_engine(config)
    yield from _unsplit_accumulation(config)
    yield from _packed_as_floats(config, quant_storage)
    yield from _quantised_by_zero(config, storage, unquantised, dtype)
    yield from _offload(config)
    if not unquantised:
        yield from _bytes_on_nvme(config, storage)
    yield from _rewritten_model(config)


def _enabled(config: Mapping[str, Any], section: str) -> bool:
    node = config.get(section)
    return isinstance(node, Mapping) and bool(node.get("enabled", False))


def _engine_type(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(section, type) of an engine that is not in fp32."""
    return next(((section, kind) for section, kind in _ENGINE_TYPES.items() if _enabled(config, section)), None)


def _precision(config: Mapping[str, Any], dtype: str) -> Iterator[str]:
    if _enabled(config, "fp16") and (_enabled(config, "bf16") or _enabled(config, "bfloat16")):
        yield "deepspeed.config has fp16.enabled and bf16.enabled both true; accepted: one of them, or neither"
    engine = _engine_type(config)
    if engine is not None and engine[1] != dtype:
        yield (
            f"deepspeed.config {engine[0]}.enabled is true, but model.dtype is {dtype}: the engine would cast the model to "
            f"{engine[1]}; accepted: model.dtype {engine[1]}, or {engine[0]}.enabled false"
        )


_NAMES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def _unsplit_accumulation(config: Mapping[str, Any]) -> Iterator[str]:
    """At stage 0 DeepSpeed accumulates gradients in the engine's own type or not at all (NotImplementedError)."""
    given = (config.get("data_types") or {}).get("grad_accum_dtype")
    if given is None or zero_stage(config) > 0:
        return
    engine_type = (_engine_type(config) or ("", "float32"))[1]
    name = str(given).removeprefix("torch.")
    if _NAMES.get(name, name) != engine_type:
        yield (
            f"deepspeed.config data_types.grad_accum_dtype is {given!r} at ZeRO stage 0, where gradients have the engine's "
            f"type; accepted: {engine_type}, or a stage above 0"
        )


def _no_fp16_engine(config: Mapping[str, Any]) -> Iterator[str]:
    """DeepSpeed asks its accelerator (`is_fp16_supported`), once the model is there."""
    from deepspeed.accelerator import get_accelerator

    if _enabled(config, "fp16") and not get_accelerator().is_fp16_supported():
        yield (
            f"deepspeed.config fp16.enabled is true, but DeepSpeed has no fp16 engine on this device "
            f"({get_accelerator().device_name()}); accepted: fp16.enabled false, with which the computation is in model.dtype "
            "all the same"
        )


def _packed_as_floats(config: Mapping[str, Any], quant_storage: str | None) -> Iterator[str]:
    engine = _engine_type(config)
    if engine is None or quant_storage is None:
        return
    name = quant_storage.removeprefix("torch.")
    if name not in ("uint8", "int8", engine[1]):
        yield (
            f"bnb_4bit_quant_storage is {name!r}, but deepspeed.config {engine[0]}.enabled is true: the engine would cast "
            f"the packed bytes as if they were {name} numbers; accepted: uint8, {engine[1]}"
        )


def _quantised_by_zero(config: Mapping[str, Any], storage: str, unquantised: bool, dtype: str) -> Iterator[str]:
    weights = config.get("weight_quantization") or {}
    for key in ("quantized_initialization", "post_init_quant"):
        if weights.get(key):
            yield (
                f"deepspeed.config weight_quantization.{key} is set: ZeRO's own 4-bit weights repeat tokens in bf16, and "
                f"the frozen weights are held in {storage} already; accepted: without it, with model.storage nf4 or int8"
            )
    section = config.get("zero_optimization") or {}
    for key in _QUANTIZED_TRAFFIC:
        if section.get(key) and (dtype != "float16" or not unquantised):
            why = (
                f"it dequantises to float16, which meets {dtype} in the product"
                if dtype != "float16"
                else f"it reads the packed bytes of storage {storage} as numbers"
            )
            yield f"deepspeed.config zero_optimization.{key} is true, but {why}; accepted: false"


def _offload(config: Mapping[str, Any]) -> Iterator[str]:
    section, stage = config.get("zero_optimization") or {}, zero_stage(config)
    for key, lowest in (("offload_param", 3), ("offload_optimizer", 1)):
        target = section.get(key) or {}
        if not isinstance(target, Mapping):
            yield f"deepspeed.config zero_optimization.{key} is {target!r}; accepted: a mapping that has a device"
            continue
        device = target.get("device", "none")
        if device == "none":
            continue
        if stage < lowest:
            yield (
                f"deepspeed.config zero_optimization.{key}.device is {device!r} at stage {stage}; "
                f"accepted: stage {lowest}{' or above' if lowest < 3 else ''}"
            )
        if device not in ("cpu", "nvme"):
            yield f"deepspeed.config zero_optimization.{key}.device is {device!r}; accepted: none, cpu, nvme"
        if device == "nvme" and not target.get("nvme_path"):
            yield f"deepspeed.config zero_optimization.{key}.nvme_path is missing; accepted with device 'nvme': a folder"


def _bytes_on_nvme(config: Mapping[str, Any], storage: str) -> Iterator[str]:
    target = (config.get("zero_optimization") or {}).get("offload_param") or {}
    if isinstance(target, Mapping) and target.get("device") == "nvme":
        yield (
            f"weights are offloaded to NVMe, but model.storage is {storage}: DeepSpeed's swapper has one type for all its "
            "buffers, and packed bytes lie beside floats; accepted: a float storage, or offload to cpu"
        )


def _rewritten_model(config: Mapping[str, Any]) -> Iterator[str]:
    """What takes the model apart, or its graph, without knowing of frozen operators."""
    if (config.get("compile") or {}).get("deepcompile") and zero_stage(config) == 3:
        yield (
            "deepspeed.config compile.deepcompile is true at ZeRO stage 3: it looks up a gradient for every parameter, and "
            "frozen ones have none; accepted: false, or a stage below 3"
        )
    parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if parallel > 1:
        yield (
            f"deepspeed.config tensor_parallel.autotp_size is {parallel}, but it cuts plain linear layers only; accepted: 1, "
            "with ZeRO stage 3 to split the weights"
        )
