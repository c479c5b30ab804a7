"""The keys of the section `run`: what is written where, and how often."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dist_subspace.config import load_config
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE
from dist_subspace.training.prepared_data import prepare_data
from dist_subspace.training.run import train
from dist_subspace.training.samples import NEW_TOKENS
from tests.hub_server import asked_from_here, hub_server
from tests.keys.bench import HELD_OUT, RECORDS, Bench, Outcome
from tests.keys.data_reference import tokenizer_of
from tests.keys.reference import assert_follows, held_out_loss, train_plainly
from tests.keys.table import Key


def _same_trajectory(outcome: Outcome, bench: Bench) -> None:
    assert outcome.trained_on == bench.usual().trained_on
    for name, tensor in bench.usual().adapter.items():
        assert torch.equal(outcome.adapter[name], tensor), name


def output_dir(bench: Bench) -> None:
    """Everything of a run is in its folder; without the key, in one that has the configuration's name."""
    bench.usual()  # which makes the folder of tokens
    config = bench.configuration({"training.max_steps": 1})
    place = bench.folder / "a" / "new" / "place"
    config["run"]["output_dir"] = str(place)
    before = set(bench.folder.iterdir())
    bench.go(config)
    assert set(bench.folder.iterdir()) - before == {bench.folder / "a"}
    written = {path.name for path in place.iterdir()}
    assert {"config.yaml", "status.json", "metrics.jsonl", "checkpoint-1", "adapter"} <= written
    del config["run"]["output_dir"]
    file = bench.folder / "named.yaml"
    file.write_text(yaml.safe_dump(config))
    with contextlib.chdir(bench.folder), contextlib.redirect_stdout(io.StringIO()):
        assert train(file) == EXIT_OK
    assert (bench.folder / "runs" / "named" / "adapter").is_dir()


def local_dir(bench: Bench) -> None:
    """Where a node keeps what is its own: the tokens of a rank that does not see the run's folder. The run is the same."""
    place = bench.folder / "disk" / "of-the-node"
    _same_trajectory(bench.run({"run.local_dir": str(place)}), bench)
    assert not place.exists()  # rank 0 sees the folder
    config = load_config(bench.configuration({"run.local_dir": str(place), "data.cache_dir": None}))
    data = prepare_data(config, tokenizer_of(bench), [False])
    (own,) = place.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700 and len(list(own.glob("tokens/*/columns.json"))) == 1
    assert data.fingerprint and not Path(config.run.output_dir).exists()


def logging_steps(bench: Bench) -> None:
    """A line's loss is the mean over the steps since the last line; the first and the last step have one always."""
    outcome = bench.run({"run.logging_steps": 4})
    expected = train_plainly(bench.peft_model(), outcome.trained_on)
    losses = expected.losses
    means = [losses[0], sum(losses[1:4]) / 3, sum(losses[4:6]) / 2]
    assert [line["step"] for line in outcome.steps] == [1, 4, 6]
    assert [line["loss"] for line in outcome.steps] == pytest.approx(means, rel=2e-5)
    assert [line["grad_norm"] for line in outcome.steps] == pytest.approx(
        [expected.norms[n] for n in (0, 3, 5)], rel=2e-5
    )
    _same_trajectory(outcome, bench)
    _counters(bench.usual())


def _counters(outcome: Outcome) -> None:
    """Each line counts the samples and tokens that the model was given until then."""
    rows, lines = outcome.trained_on, outcome.steps
    tokens = accumulate(sum(map(len, rows[start : start + 4])) for start in range(0, len(rows), 4))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [line["tokens"] for line in lines] == list(tokens)
    assert [line["epoch"] for line in lines] == pytest.approx([4 * step / RECORDS for step in range(1, 7)])
    seconds = [line["elapsed_seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 2**20 for line in lines)


def eval_steps(bench: Bench) -> None:
    """Null: at the end alone. Before the first step it is measured in any case."""
    for every, steps in ((2, [0, 2, 4, 6]), (4, [0, 4, 6]), (None, [0, 6])):
        outcome = bench.run({"run.eval_steps": every, "data.eval": bench.held_out})
        assert [line["step"] for line in outcome.evaluations] == steps
        losses: dict[int, float] = {}
        rows = outcome.evaluated_on[:HELD_OUT]

        def evaluate(
            step: int, model: nn.Module, schedule: object, rows: object = rows, losses: object = losses
        ) -> None:
            losses[step] = held_out_loss(model, rows)  # type: ignore[index, arg-type]

        expected = train_plainly(bench.peft_model(), outcome.trained_on, after_step=evaluate, before=True)
        found = [line["eval_loss"] for line in outcome.evaluations]
        assert found == pytest.approx([losses[step] for step in steps], rel=2e-5)
        assert_follows(outcome, expected)


def report_to(bench: Bench) -> None:
    """Inert by design for what is trained: it adds files, which hold what metrics.jsonl holds."""
    outcome = bench.run({"run.report_to": ["tensorboard"]})
    _same_trajectory(outcome, bench)
    extra = {path.name for path in outcome.folder.iterdir()} - {path.name for path in bench.usual().folder.iterdir()}
    assert extra == {"tensorboard"}
    events = EventAccumulator(str(outcome.folder / "tensorboard"))
    events.Reload()
    for key in ("loss", "learning_rate", "grad_norm"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in told] == pytest.approx([line[key] for line in outcome.steps], rel=1e-6)


def sample_prompts(bench: Bench) -> None:
    """At each evaluation the model's own greedy answer behind each prompt; the trajectory stays, and what goes on writes anew."""
    prompts = ["a says 0", "b says"]
    changes = {"data.eval": bench.held_out, "run.eval_steps": 3, "checkpoint.save_steps": 3}
    config = bench.configuration(changes | {"run.sample_prompts": prompts, "run.report_to": ["tensorboard"]})
    outcome, plain = bench.go(config), bench.run(changes)
    for name, tensor in plain.adapter.items():
        assert torch.equal(outcome.adapter[name], tensor), name
    found = [json.loads(line) for line in (outcome.folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, text) for step in (0, 3, 6) for text in prompts
    ]
    assert [line["answer"] for line in found] == [text for step in (0, 3, 6) for text in _greedy(bench, outcome, step)]
    assert f"sample at step 6 | {prompts[1]!r} -> {found[5]['answer']!r}" in outcome.said
    events = EventAccumulator(str(outcome.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 3, 6]
    shutil.rmtree(outcome.folder / "checkpoint-6")
    assert [json.loads(line) for line in (bench.go(config).folder / "samples.jsonl").read_text().splitlines()] == found
    assert not (plain.folder / "samples.jsonl").exists()


def _greedy(bench: Bench, outcome: Outcome, step: int) -> list[str]:
    """What PEFT's model writes, with the adapter of that step."""
    start = outcome.folder / f"checkpoint-{step}" if step else bench.folder / "start"
    model, tokenizer = PeftModel.from_pretrained(bench.base_model(), start).eval(), tokenizer_of(bench)
    told = []
    for prompt in ("a says 0", "b says"):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=1, pad_token_id=1
            )
        told.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return told


def profile(bench: Bench) -> None:
    """Two steps of two micro-batches each are traced, the third and the fourth; the trajectory stays."""
    outcome = bench.run({"run.profile": 2})
    _same_trajectory(outcome, bench)
    folder = outcome.folder / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    for name, count in (("data", 2), ("forward", 4), ("backward", 4), ("optimizer", 2)):
        assert (
            sum(event.get("name") == f"step/{name}" and event["cat"] == "user_annotation" for event in events) == count
        )
    table = (folder / "table.txt").read_text()
    assert "aten::mm" in table and all(f"{name} " in table for name in ("data", "forward", "backward", "optimizer"))
    assert f"profile of 2 steps in {folder}:" in outcome.said and " s a step " in outcome.said
    assert not (bench.usual().folder / "profile").exists()


def push_to_hub(bench: Bench) -> None:
    """The final adapter is what the repository holds. A Hub that fails costs a sentence, and neither the run nor its adapter."""
    home = bench.folder / "hub-cache"
    with hub_server() as hub, asked_from_here(hub.address, home, "hf_mine"):
        outcome = bench.run({"run.push_to_hub": "me/mine"})
        files = hub.repositories["me/mine"].files
        assert files["adapter_model.safetensors"] == (outcome.folder / "adapter/adapter_model.safetensors").read_bytes()
        assert not hub.repositories["me/mine"].private and "loss.png" in files
        assert not any("checkpoint" in name or "optimizer" in name for name in files)
        _same_trajectory(outcome, bench)
        hub.repositories["me/mine"].where, hub.repositories["me/mine"].always = "/preupload/", 400
        outcome = bench.run({"run.push_to_hub": "me/mine"})
        again = f"`dist-subspace push {outcome.folder} me/mine` does it"
        assert (
            "the adapter was not pushed (run.push_to_hub is 'me/mine', and " in outcome.said and again in outcome.said
        )
        assert bench.run({"run.push_to_hub": "you/yours"}, expect=EXIT_USAGE).message.endswith("under me, my-lab")
    with asked_from_here("http://127.0.0.1:9", home):
        assert "HF_TOKEN is not set" in bench.run({"run.push_to_hub": "me/mine"}, expect=EXIT_USAGE).message


def hub_private_repo(bench: Bench) -> None:
    with hub_server() as hub, asked_from_here(hub.address, bench.folder / "hub-cache", "hf_mine"):
        outcome = bench.run({"run.push_to_hub": "me/secret", "run.hub_private_repo": True})
        assert hub.repositories["me/secret"].private
        _same_trajectory(outcome, bench)


KEYS = [
    Key("run.output_dir", ("a folder", "unset"), "where everything is written", "the folder's files", output_dir),
    Key(
        "run.local_dir",
        ("a folder",),
        "inert by design for the trajectory: where a node keeps its own",
        "the folder's files; bit-equal adapters",
        local_dir,
    ),
    Key(
        "run.logging_steps", (4,), "which steps have a line, with the mean loss since the last", "a loop", logging_steps
    ),
    Key("run.eval_steps", (2, 4, None), "after which steps it is evaluated", "a loop that evaluates then", eval_steps),
    Key(
        "run.report_to",
        ("tensorboard", "none"),
        "inert by design for the trajectory: trackers get the same figures",
        "TensorBoard's reader; bit-equal adapters",
        report_to,
    ),
    Key(
        "run.sample_prompts",
        (["two", "prompts"],),
        "inert by design for the trajectory: the model's greedy answers at each evaluation",
        "PEFT's model, transformers' generate; bit-equal adapters",
        sample_prompts,
    ),
    Key(
        "run.push_to_hub",
        ("a name", "another's name"),
        "inert by design for the trajectory: where the final adapter is pushed",
        "a Hub's repository; bit-equal adapters",
        push_to_hub,
    ),
    Key(
        "run.hub_private_repo",
        (True,),
        "inert by design for the trajectory: who may read the repository",
        "a Hub's repository; bit-equal adapters",
        hub_private_repo,
    ),
    Key(
        "run.profile",
        (2,),
        "inert by design for the trajectory: so many steps are traced",
        "the parts of a step in torch's trace; bit-equal adapters",
        profile,
    ),
]
