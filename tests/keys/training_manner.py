"""Keys of `training` that say how a step is made: checkpointing, repetition, what is not finite, and when to stop."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import enable_full_determinism, get_scheduler

from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, read_status
from tests.faults.decisions import is_stopped_after
from tests.forked_ranks import Ended, run_script, side_by_side
from tests.keys.bench import Bench, Outcome
from tests.keys.reference import assert_follows, train_plainly
from tests.keys.table import Key

LAYERS = 2
STEPS = 300  # more than can be made in a second


def _checkpointed(bench: Bench, *grad: bool, **changes: object) -> Outcome:
    """Each layer is called once for each of `grad`, with and without a graph; the trajectory stays."""
    outcome = bench.run({name.replace("__", "."): value for name, value in changes.items()})
    micro_batches = sum(call.trains for call in outcome.calls)
    assert micro_batches == 12
    assert sorted(outcome.seen.layers) == sorted(grad * LAYERS * micro_batches)
    assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on))
    return outcome


def gradient_checkpointing(bench: Bench) -> None:
    _checkpointed(bench, True)
    _checkpointed(bench, True, True, training__gradient_checkpointing=True)


def use_reentrant(bench: Bench) -> None:
    """torch's older form makes its first pass without a graph, and the second one in backward with it."""
    kwargs = {"use_reentrant": True}
    changes = {"training__gradient_checkpointing": True, "training__gradient_checkpointing_kwargs": kwargs}
    _checkpointed(bench, False, True, **changes)


def activation_offload(bench: Bench) -> None:
    """On a CPU a sentence, and the trajectory stays; tests/gpu/test_activation_offload.py is about a GPU."""
    outcome = _checkpointed(bench, True, True, training__gradient_checkpointing=True, training__activation_offload=True)
    assert "activations lie in the computer's memory already" in outcome.said


def full_determinism(bench: Bench) -> None:
    """As transformers' own function sets torch; without the key nothing is set."""
    names, cudnn = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"), torch.backends.cudnn

    def state() -> tuple[object, ...]:
        algorithms = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        return (*algorithms, *(os.environ.get(name) for name in names))

    before = {name: os.environ.pop(name, None) for name in names}
    flags = (cudnn.deterministic, cudnn.benchmark)
    try:
        enable_full_determinism(0)
        wanted = state()
        torch.use_deterministic_algorithms(False)
        plain = bench.run({"training.full_determinism": False, "training.max_steps": 1})
        assert [call.deterministic for call in plain.calls if call.trains] == [False] * 2
        for name in names:
            os.environ.pop(name, None)
        cudnn.deterministic, cudnn.benchmark = flags
        strict = bench.run({"training.full_determinism": True, "training.max_steps": 2})
        assert [call.deterministic for call in strict.calls if call.trains] == [True] * 4
        assert state() == wanted
        assert_follows(strict, train_plainly(bench.peft_model(), strict.trained_on))
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = flags
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def on_nonfinite(bench: Bench) -> None:
    """One sample makes the loss no number: a loop that leaves its step out is followed, or the run ends there."""
    model = bench.base_model()
    poisoned = bench.folder / "poisoned"
    with torch.no_grad():
        model.get_input_embeddings().weight[bench.token("~")] = float("nan")
    bench.save_model(model, poisoned)
    data = bench.write("poisoned.jsonl", [{"text": f"{n} {'~' if n == 4 else ''}{n * 7}"} for n in range(12)])
    changes = {"model.path": str(poisoned), "data.train": data, "training.max_steps": 5, "checkpoint.save_steps": 1}
    changes |= {"training.lr_scheduler_type": "linear", "checkpoint.save_total_limit": None}
    skipped = bench.run(changes | {"training.on_nonfinite": "skip"})
    bad = sorted({n // 4 + 1 for n, row in enumerate(skipped.trained_on) if bench.token("~") in row})
    schedule = partial(get_scheduler, "linear", num_warmup_steps=0, num_training_steps=5)  # which goes on meanwhile
    expected = train_plainly(bench.peft_model(base=poisoned), skipped.trained_on, scheduler=schedule)
    assert [step for step, loss in enumerate(expected.losses, 1) if loss != loss] == bad and bad[0] < 5
    assert_follows(skipped, expected)
    assert all(f"step {step} skipped: loss nan ({count} so far)" in skipped.said for count, step in enumerate(bad, 1))
    stopped = bench.run(changes | {"training.on_nonfinite": "stop"}, EXIT_FAILED)
    assert stopped.message.startswith(f"step {bad[0]} has loss nan, and training.on_nonfinite is stop")
    assert stopped.checkpoints == list(range(1, bad[0])) and len(stopped.steps) == bad[0] - 1


def early_stopping_patience(bench: Bench) -> None:
    """On texts that training has nothing of the held-out loss turns round: the run ends so many evaluations behind its lowest
    value, keeps that one, and goes on as if it had never ended where there is more patience."""
    data = bench.write("strange.jsonl", [{"text": text} for text in ("#!?", "%&/()=")])
    changes = {"data.eval": data, "run.eval_steps": 1, "training.learning_rate": 0.3, "run.logging_steps": 50}
    changes |= {"checkpoint.save_steps": 1, "checkpoint.save_total_limit": None}
    whole = bench.run(changes)
    losses = {line["step"]: line["eval_loss"] for line in whole.evaluations if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert 1 <= best < 5
    config = bench.configuration(changes | {"training.early_stopping_patience": 2})
    stopped = bench.go(config)
    ends = next(step for step in losses if step - min(range(1, step + 1), key=lambda s: losses[s]) >= 2)
    assert ends < 6 and [line["step"] for line in stopped.steps] == [1, ends] and stopped.checkpoints[-1] == ends
    assert f"stopped early after step {ends}: 2 evaluations without a better eval_loss than" in stopped.said
    assert f"(of checkpoint-{best}, the best by eval_loss: {losses[best]:.6g})" in stopped.said
    kept = load_file(whole.folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(stopped.adapter[name], tensor) for name, tensor in kept.items())
    lines, again = stopped.lines, bench.go(config)
    assert again.lines == lines and again.checkpoints[-1] == ends
    assert f"stopped early after step {ends}" in again.said
    config["training"]["early_stopping_patience"] = 6
    patient = bench.go(config)
    assert [line["eval_loss"] for line in patient.evaluations] == [line["eval_loss"] for line in whole.evaluations]


def max_time(bench: Bench) -> None:
    """The run leaves with what it has, whole, and the same configuration goes on from there."""
    outcome = bench.run({"training.max_time": "0:00:01", "training.max_steps": STEPS}, EXIT_INTERRUPTED)
    made = len(outcome.steps)
    assert made < STEPS and outcome.checkpoints == ([made] if made else [])
    assert "training.max_time" in outcome.message
    expected = train_plainly(bench.peft_model(), outcome.trained_on[: 4 * min(made, 20)])
    assert_follows(outcome, expected, first=min(made, 20))


def rank_timeout(bench: Bench) -> None:
    """Of two ranks one is stopped for good in its second step: the other leaves within the time, or stays, and names it."""
    leaving, staying = (partial(_with_a_stopped_rank, bench, timeout) for timeout in (12.0, None))
    (left, seconds, message), (stayed, _, _) = side_by_side(leaving, staying)
    assert left.status == 1 and seconds < 12.0 + 1.0 and "rank 1 (process " in message, left
    assert stayed.status is None, stayed


def _with_a_stopped_rank(bench: Bench, timeout: float | None) -> tuple[Ended, float, str]:
    """How rank 0 ended, how many seconds after the last step, and what status.json says."""
    config = bench.configuration({"training.max_steps": 5000, "training.rank_timeout": timeout})
    run = Path(config["run"]["output_dir"])
    file, metrics = run.with_suffix(".yaml"), run / "metrics.jsonl"
    file.write_text(yaml.safe_dump(config))
    began = time.monotonic()
    before = {1: (is_stopped_after, str(metrics))}
    first = run_script(2, [str(file)], bench.folder, before=before, limit=24.0)[0]
    stopped = metrics.stat().st_mtime - time.time() + time.monotonic()
    return first, began + first.seconds - stopped, str((read_status(run) or {})["message"])


KEYS = [
    Key(
        "training.gradient_checkpointing",
        (True,),
        "each layer is computed again in backward; the trajectory stays",
        "calls of the layers, seen by torch's hooks",
        gradient_checkpointing,
    ),
    Key(
        "training.gradient_checkpointing_kwargs.use_reentrant",
        (True,),
        "the first pass has no graph; the trajectory stays",
        "calls of the layers, seen by torch's hooks",
        use_reentrant,
    ),
    Key(
        "training.activation_offload",
        (True,),
        "on a GPU activations are kept off it; on a CPU a sentence says that they are; the trajectory stays",
        "PEFT's model in a plain loop",
        activation_offload,
    ),
    Key(
        "training.full_determinism",
        (True,),
        "torch's deterministic algorithms and CUDA's variables",
        "transformers.enable_full_determinism",
        full_determinism,
    ),
    Key(
        "training.on_nonfinite",
        ("skip", "stop"),
        "skip: the step changes nothing; stop: the run fails there",
        "a loop that leaves the step out",
        on_nonfinite,
    ),
    Key(
        "training.early_stopping_patience",
        (2, 6),
        "the run ends after so many evaluations without a better one, which is what it keeps",
        "the evaluations of a run without it; bit-equal adapters",
        early_stopping_patience,
    ),
    Key(
        "training.max_time",
        ("0:00:01",),
        "saves and stops, exit status 75",
        "the exit status, the checkpoint; torch.optim.AdamW up to there",
        max_time,
    ),
    Key(
        "training.rank_timeout",
        (12.0, None),
        "how long the others stay with a rank that is frozen; null: as long as a collective does",
        "a rank that is stopped by SIGSTOP, and the clock",
        rank_timeout,
    ),
]
