"""A stock JSON says what the YAML says, value by value, or is refused with both names."""

from __future__ import annotations

from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.training.engine_config import engine_config
from dist_subspace.training.plan import Plan, make_plan
from tests.keys.bench import UNSET, Bench

# Every value of the YAML that a JSON can say too, all different; and where the JSON has it.
YAML = {
    "training.learning_rate": 0.011,
    "training.adam_beta1": 0.81,
    "training.adam_beta2": 0.92,
    "training.adam_epsilon": 1e-6,
    "training.weight_decay": 0.07,
    "training.max_grad_norm": 0.6,
    "training.max_steps": 10,
    "training.warmup_steps": 0.25,
    "training.lr_scheduler_type": "linear",
}
JSON: dict[str, tuple[Any, str]] = {
    "optimizer.params.lr": (0.011, "training.learning_rate"),
    "optimizer.params.betas": ([0.81, 0.92], "training.adam_beta1"),
    "optimizer.params.eps": (1e-6, "training.adam_epsilon"),
    "optimizer.params.weight_decay": (0.07, "training.weight_decay"),
    "scheduler.params.warmup_max_lr": (0.011, "training.learning_rate"),
    "scheduler.params.warmup_num_steps": (3, "training.warmup_steps"),
    "scheduler.params.total_num_steps": (10, "the run's number of steps"),
    "gradient_clipping": (0.6, "training.max_grad_norm"),
    "train_batch_size": (4, "training.global_batch_size"),
    "train_micro_batch_size_per_gpu": (2, "training.per_device_train_batch_size"),
    "gradient_accumulation_steps": (2, "training.global_batch_size"),
}
TYPES = {"optimizer": "AdamW", "scheduler": "WarmupDecayLR"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("plans"))


def stock(**entries: Any) -> dict[str, Any]:
    """A JSON with these entries, by their dotted names."""
    tree: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    for name, value in entries.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {"type": TYPES[section]} if section in TYPES else {})
        node[key] = value
    return tree


def plan_of(bench: Bench, config: dict[str, Any], **changes: Any) -> Plan:
    return make_plan(load_config(bench.configuration(YAML | {"deepspeed.config": config} | changes)), lambda said: None)


def test_a_json_that_says_all_that_the_yaml_says_is_taken(bench: Bench) -> None:
    made = engine_config(plan_of(bench, stock(**{name: value for name, (value, _) in JSON.items()})), None)
    assert (made["gradient_clipping"], made["train_batch_size"], made["gradient_accumulation_steps"]) == (0.6, 4, 2)


@pytest.mark.parametrize("entry", JSON)
def test_a_value_that_is_not_the_yamls_is_refused_with_both_names(entry: str, bench: Bench) -> None:
    value, key = JSON[entry]
    other = [0.9, 0.999] if isinstance(value, list) else value * 2
    with pytest.raises(UsageError) as refused:
        engine_config(plan_of(bench, stock(**{entry: other})), None)
    assert f"deepspeed.config {entry} is {other!r}, but {key}" in str(refused.value)


@pytest.mark.parametrize(
    ("section", "kind", "key"),
    [("optimizer", "Adagrad", "training.optim"), ("scheduler", "WarmupLR", "training.lr_scheduler_type")],
)
def test_another_optimizer_or_schedule_than_the_yamls_is_refused(
    section: str, kind: str, key: str, bench: Bench
) -> None:
    config = {section: {"type": kind}}
    with pytest.raises(UsageError, match=rf"deepspeed\.config {section}\.type is '{kind}', but {key} is"):
        engine_config(plan_of(bench, config, **{"training.optim": "adamw_torch"}), None)


def test_an_engine_of_another_type_than_the_computation_is_refused(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"bf16\.enabled is true, but model\.dtype is float32"):
        engine_config(plan_of(bench, {"bf16": {"enabled": True}}), None)


def test_packed_bytes_are_not_sent_to_nvme(bench: Bench) -> None:
    changes = {"deepspeed.config": UNSET, "deepspeed.preset": "zero3-nvme", "deepspeed.nvme_path": "fast"}
    plan = plan_of(bench, {}, **changes, **{"model.storage": "nf4", "model.dtype": "float32"})
    with pytest.raises(UsageError, match=r"model\.storage is nf4: DeepSpeed's swapper has one type"):
        engine_config(plan, None)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"stage": 2, "zero_hpz_partition_size": 2}, "is 2 at stage 2, where no weight is split"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "is 2, and there are 1 ranks"),
        ({"stage": 3, "zero_hpz_partition_size": "auto"}, 'zero_hpz_partition_size is "auto", which is not known'),
    ],
)
def test_second_shards_of_a_stock_json_that_cannot_be_are_refused(
    section: dict[str, Any], reason: str, bench: Bench
) -> None:
    with pytest.raises(UsageError, match=reason):
        engine_config(plan_of(bench, {"zero_optimization": section}), None)
