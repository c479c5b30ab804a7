"""The keys of the section `deepspeed`: what the engine really is, and that the trajectory is the same in each."""

from __future__ import annotations

import json
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import get_scheduler

from dist_subspace.config import load_config
from dist_subspace.placement.whole.engine import WholeEngine
from dist_subspace.run_folder.status import EXIT_USAGE
from dist_subspace.training.engine_config import engine_config
from dist_subspace.training.plan import make_plan
from tests.keys.bench import UNSET, Bench, Outcome
from tests.keys.reference import assert_follows, decaying, train_plainly
from tests.keys.table import Key

# preset -> stage, whether stages below 3 split gradients, and the devices of offloaded optimizer and parameters
PRESETS: dict[str, tuple[int, bool, str | None, str | None]] = {
    "zero0": (0, False, None, None),
    "zero1": (1, False, None, None),
    "zero2": (2, True, None, None),
    "zero3": (3, True, None, None),
    "zero3-hpz": (3, True, None, None),
    "zero2-offload": (2, True, "cpu", None),
    "zero3-offload": (3, True, "cpu", "cpu"),
    "zero3-nvme": (3, True, "cpu", "nvme"),
}


def preset(bench: Bench) -> None:
    for name, (stage, splits, optimizer, parameters) in PRESETS.items():
        if name == "zero3-nvme":  # whose helper DeepSpeed compiles: `deepspeed.nvme_path` reads its configuration
            continue
        if name == "zero3-hpz":  # on nodes of several ranks: tests/placement/test_nodes.py
            bench.run({"deepspeed.preset": name}, expect=EXIT_USAGE)
            continue
        changes = {"training.max_steps": 3, "training.max_grad_norm": 0.1, "training.weight_decay": 0.5}
        outcome = bench.run(changes | {"deepspeed.preset": name})
        engine = outcome.seen.engines[-1]
        assert engine.zero_optimization_stage() == stage, name
        if stage in (1, 2):
            assert engine.optimizer.partition_gradients == splits, name
            assert engine.optimizer.cpu_offload == (optimizer is not None), name
        if stage == 3:
            assert engine.optimizer.offload_optimizer == (optimizer is not None), name
            assert engine.optimizer.offload_param == (parameters is not None), name
            block = sum(p.numel() for p in bench.base_model().model.layers[0].parameters())
            assert engine._config.zero_config.max_live_parameters == 2 * block, "two blocks are live at most"
        assert engine.get_data_types()[0] == torch.float32, name
        _check_partition(outcome, stage, name)
        expected = train_plainly(bench.peft_model(), outcome.trained_on, optimizer=decaying, max_grad_norm=0.1)
        assert_follows(outcome, expected)
    _plain(bench)


def _plain(bench: Bench) -> None:
    """Without DeepSpeed: the same trajectory."""
    changes = {"training.max_steps": 3, "training.max_grad_norm": 0.1, "training.weight_decay": 0.5}
    outcome = bench.run(changes | {"deepspeed.preset": "none"})
    assert isinstance(outcome.seen.engines[-1], WholeEngine)
    expected = train_plainly(bench.peft_model(), outcome.trained_on, optimizer=decaying, max_grad_norm=0.1)
    assert_follows(outcome, expected)


def _check_partition(outcome: Outcome, stage: int, name: str) -> None:
    """At stage 3 no frozen element is there when a forward begins; below, every one is."""
    parameters = list(outcome.seen.engines[-1].module.parameters())
    trained = sum(p.ds_numel if stage == 3 else p.numel() for p in parameters if p.requires_grad)
    everything = sum(p.ds_numel if stage == 3 else p.numel() for p in parameters)
    held = [call.held for call in outcome.calls if call.trains]
    assert held and 0 < trained < everything
    assert all(number <= trained for number in held) if stage == 3 else held == [everything] * len(held), name


def nvme_path(bench: Bench) -> None:
    """As DeepSpeed reads the configuration of the engine."""
    changes = {"deepspeed.preset": "zero3-nvme", "deepspeed.nvme_path": str(bench.folder / "fast")}
    plan = make_plan(load_config(bench.configuration(changes)), lambda sentence: None)
    zero = DeepSpeedConfig(engine_config(plan, None)).zero_config
    assert (zero.stage, zero.offload_param.device, zero.offload_optimizer.device) == (3, "nvme", "cpu")
    assert str(zero.offload_param.nvme_path) == str(bench.folder / "fast")


def stock(bench: Bench) -> dict[str, Any]:
    """A JSON with values of its own and with "auto", as Hugging Face's documentation gives one."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 777,
        "prescale_gradients": False,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"},
        },
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12345, "allgather_bucket_size": 23456},
    }


def config(bench: Bench) -> None:
    """Given as a file and in itself. Optimizer and schedule are the JSON's where the YAML leaves them open."""
    file = bench.folder / "stock.json"
    file.write_text(json.dumps(stock(bench)))
    changes: dict[str, Any] = {"training.optim": UNSET, "training.lr_scheduler_type": UNSET}
    changes |= {"training.max_grad_norm": 0.1, "training.warmup_steps": 2, "deepspeed.preset": "zero3"}
    silent = {key: value for key, value in stock(bench).items() if key != "gradient_clipping"}  # then the YAML's counts
    for source in (str(file), silent):
        outcome = bench.run(changes | {"deepspeed.config": source})
        engine = outcome.seen.engines[-1]
        read = engine._config
        assert (read.zero_config.stage, engine.zero_optimization_stage()) == (2, 2)
        assert (read.zero_config.reduce_bucket_size, read.zero_config.allgather_bucket_size) == (12345, 23456)
        assert engine.optimizer.reduce_bucket_size == 12345
        assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (4, 2)
        assert (read.gradient_accumulation_steps, read.gradient_clipping, read.steps_per_print) == (2, 0.1, 777)
        assert not read.bfloat16_config.enabled and engine.lr_scheduler is None
        expected = train_plainly(
            bench.peft_model(),
            outcome.trained_on,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
            scheduler=lambda optimizer: get_scheduler("linear", optimizer, 2, 6),
            max_grad_norm=0.1,
        )
        assert_follows(outcome, expected)


KEYS = [
    Key(
        "deepspeed.preset",
        tuple(PRESETS),
        "the engine's stage and offload, and where parameters are; the trajectory stays",
        "DeepSpeed's engine and its partitioned parameters; torch.optim.AdamW",
        preset,
    ),
    Key(
        "deepspeed.config",
        ("a file", "a mapping"),
        "the engine takes the JSON's values, the run its optimizer and schedule",
        "DeepSpeed's engine; torch.optim.SGD with get_scheduler",
        config,
    ),
    Key("deepspeed.nvme_path", ("a folder",), "where weights are swapped to", "DeepSpeedConfig", nvme_path),
]
