"""What is read from the Hub, by huggingface_hub itself from a small hub on this machine that fails in all ways a hub fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.load import download
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import world
from tests.hub_server import CUT, HubServer, hub_server
from tests.loading.folders_of_formats import FIRST, FORMATS, SECOND, in_two_files
from tests.named_hosts import named_host
from tests.quantised_folders import operators
from tests.ranks import ROOT, run_on_ranks
from tests.tiny_run import make_model, make_records

LIMIT = 240.0
# Each name is asked for in turn; a line of JSON for each: the folder, or what a refusal says, what else was said, and seconds.
ASK = """
import json, sys, time
from dist_subspace.errors import UsageError
from dist_subspace.loading import hub
from dist_subspace.notices import heard
hub.WAITS = tuple(map(float, sys.argv[1].split(",")))
for name in sys.argv[2:]:
    said, began = [], time.monotonic()
    with heard(said.append):
        try:
            found = str(hub.fetch(name, "model.path"))
        except UsageError as error:
            found = f"error: {error}"
    print(json.dumps([found, said, time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("hub") / "model", layers=1)
    (folder / "README.md").write_text("not fetched")
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def ask(
    hub: HubServer, home: Path, *names: str, waits: str = "0.1,0.1,0.1", **more: str
) -> list[tuple[str, list[str], float]]:
    command = [sys.executable, "-c", ASK, waits, *names]
    environment = hub.environment(home, PYTHONPATH=str(ROOT), **more)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_what_passes_is_asked_for_again_and_a_download_that_broke_is_taken_up(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.add("busy/question", model, faults=[503, 429], where="api/", headers={"Retry-After": "1"})
    hub.add("busy/list", model, faults=[200, 200, 500], where="api/")
    hub.add("busy/file", model, faults=[CUT, 502], where="safetensors")
    found = ask(hub, tmp_path, "busy/question", "busy/list", "busy/file")
    for name, (folder, said, seconds) in zip(hub.repositories, found, strict=True):
        assert Path(folder).parts[-3:] == (f"models--{name.replace('/', '--')}", "snapshots", "a" * 40), folder
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (Path(folder) / file).read_bytes() == (model / file).read_bytes()
        assert not (Path(folder) / "README.md").exists() and said == []
        assert seconds > 2 or name != "busy/question", "the hub said for how long it is not to be asked"


REFUSED = {
    "gone/away": (503, r"in 4 tries \(HTTP 503\); accepted: the same command later"),
    "gated/model": (403, r"in 1 try \(HTTP 403: .* the hub wants a token, and HF_TOKEN is not set here\); accepted: access"),
    "secret/model": (401, r"in 1 try \(HTTP 401: "),
    "not/there": (404, r"in 1 try \(HTTP 404: there is no such repository or file\); accepted: a name that http"),
    "too/often": (429, r"in 1 try \(HTTP 429\); accepted: the same command later, or HF_TOKEN set"),  # for an hour
}  # fmt: skip


def test_what_does_not_come_is_one_sentence_with_host_tries_and_what_to_do(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    for name, (status, _) in REFUSED.items():
        hub.add(name, model, always=status, where="api/", headers={"Retry-After": "3600" if status == 429 else "0"})
    del hub.repositories["not/there"]
    found = ask(hub, tmp_path, *REFUSED)
    for (name, (_, words)), (answer, _, _) in zip(REFUSED.items(), found, strict=True):
        start = f"error: model.path is '{name}', which is not here, and {hub.address} did not give it to {socket.gethostname()} "
        assert re.fullmatch(re.escape(start) + words + ".*", answer), answer
    ((with_token, _, _),) = ask(hub, tmp_path, "gated/model", HF_TOKEN="hf_secret")
    assert "the hub refuses the token here" in with_token and "hf_secret" not in with_token
    ((offline, _, _),) = ask(hub, tmp_path, "gone/away", HF_HUB_OFFLINE="1")
    assert (
        "in 1 try (HF_HUB_OFFLINE is set, and the cache does not hold it); accepted: HF_HUB_OFFLINE=0, or " in offline
    )
    assert f"HF_HOME ({tmp_path}) beforehand, as by `hf download gone/away`" in offline
    ((nobody, _, _),) = ask(hub, tmp_path, "gone/away", HF_ENDPOINT="http://127.0.0.1:9")
    assert (
        "in 4 tries (ConnectionRefusedError: [Errno 111] " in nobody
        and "accepted: a way to it from this host (HF_ENDPOINT, " in nobody
    )


def test_a_whole_copy_is_taken_where_the_hub_cannot_be_asked_and_that_is_said(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    own = hub.add("own/model", model)
    ((before, _, _),) = ask(hub, tmp_path, "own/model")
    own.always, own.commit = 503, "b" * 40
    ((copy, said, _),) = ask(hub, tmp_path, "own/model")
    assert copy == before and len(said) == 1
    assert said[0].startswith(
        "the copy of own/model in this machine's cache (commit aaaaaaaaaaaa) is taken: model.path is "
    )
    own.always = 200
    ((now, said, _),) = ask(hub, tmp_path, "own/model")
    assert Path(now).name == own.commit and said == [], "where it answers, the hub has the last word"
    (Path(now) / "model.safetensors").unlink()  # as where a download was broken off
    own.always = 503
    ((torn, _, _),) = ask(hub, tmp_path, "own/model")
    assert torn.startswith("error: ") and "(HTTP 503)" in torn


def test_only_the_files_that_are_read_are_fetched(hub: HubServer, model: Path, tmp_path: Path) -> None:
    """Other formats, the makers' own files and copies of the same weights stay there, with and without an index."""
    for name, sizes in (("one/file", {}), ("many/files", {"max_shard_size": "20KB"})):
        folder = tmp_path / name
        LlamaForCausalLM.from_pretrained(model).save_pretrained(folder, **sizes)
        copy_files(model, folder, "tokenizer.json", "tokenizer_config.json")
        beside = ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "flax_model.msgpack")
        for other in (*beside, "original/model.safetensors", "original/params.json", "onnx/model.onnx", "README.md"):
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(b"not read")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        hub.add(name, folder)
        wanted = {file for file in hub.repositories[name].files if hub.repositories[name].files[file] != b"not read"}
        ((found, _, _),) = ask(hub, tmp_path / "home", name)
        got = {path.relative_to(found).as_posix() for path in Path(found).rglob("*") if path.is_file()}
        assert got == wanted and any(file.startswith("model") for file in got)
        ((again, said, _),) = ask(hub, tmp_path / "home", name, HF_HUB_OFFLINE="1")
        assert again == found and "HF_HUB_OFFLINE is set" in said[0], "a copy without what is not read is whole"
    assert len(set(got)) > 8


PINNED = """
import json, sys
from dist_subspace.errors import UsageError
from dist_subspace.loading import hub
hub.WAITS = (0.0,)
for revision in sys.argv[1:]:
    try:
        print(json.dumps(str(hub.fetch("own/model", "model.path", revision=None if revision == "unset" else revision))))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def pinned(hub: HubServer, home: Path, *revisions: str, **more: str) -> list[str]:
    """For each revision the folder, or what a refusal says."""
    environment = hub.environment(home, PYTHONPATH=str(ROOT), **more)
    command = [sys.executable, "-c", PINNED, *revisions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_revision_of_quantised_weights_is_what_is_read_and_a_commit_is_not_asked_for_again(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch, a tag, a commit; in bitsandbytes' 4 bits and in two files, which are held as they are."""
    own = hub.add("own/model", in_two_files(FORMATS["bitsandbytes 4 bits"][1](tmp_path / "main")))
    older = in_two_files(FORMATS["bitsandbytes 4 bits"][1](tmp_path / "older"))
    own.revisions["v1"] = hub.add("another/name", older, commit="b" * 40)
    del hub.repositories["another/name"]
    home, whole = tmp_path / "home", "b" * 40
    newest, tag, commit, again, short, nothing = pinned(hub, home, "unset", "v1", whole, whole, "bbbb", "v2")
    assert [Path(found).name for found in (newest, tag, commit, again)] == ["a" * 40, *[whole] * 3]
    assert hub.asked("GET", f"revision/{whole}") == [], "the tag has brought it, and a commit never changes"
    start = (
        f"model.path is 'own/model' at model.revision 'v2', which is not here, and {hub.address} did not give it to "
    )
    assert nothing.startswith(start) and "in 1 try (HTTP 404: it has no such revision); accepted: a branch" in nothing
    assert "at model.revision 'bbbb'" in short
    offline = pinned(hub, home, "v1", "v2", HF_HUB_OFFLINE="1")
    assert offline[0] == tag and "at model.revision 'v2'" in offline[1] and "HF_HUB_OFFLINE is set" in offline[1]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, folder in ((None, tmp_path / "main"), ("v1", older), (whole, older)):
        model = load_frozen("own/model", "fp4", dtype="float32", revision=revision)
        file = load_file(folder / FIRST) | load_file(folder / SECOND)
        assert torch.equal(model.get_input_embeddings().weight, file["model.embed_tokens.weight"].float())  # type: ignore[operator]
        held = operators(model, "fp4")
        assert len(held) == 7
        for name, operator in held.items():
            assert torch.equal(operator.codes.view(torch.uint8), file[f"{name}.weight"].view(-1)), name


def test_a_folder_has_no_revision(model: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.revision is 'v1', but model\.path is .*accepted with a folder: null"):
        load_frozen(model, "bf16", revision="v1")


def copy_files(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())


def downloaded(caches: list[Path]) -> str:
    """Each rank is the first of its node, which has a cache of its own and no way to the hub."""
    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, os.environ["LOCAL_RANK"]
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(caches[world().rank]), True
    os.environ["LOCAL_RANK"] = "0"
    try:
        with named_host(f"node{world().rank + 1}"), heard(lambda sentence: None):
            download("own/model")
    except UsageError as error:
        return str(error)
    finally:
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, os.environ["LOCAL_RANK"] = before
    return "goes on"


def copy_of(cache: Path, commit: str) -> Path:
    """A cache with a commit of the model."""
    own = cache / "models--own--model"
    (own / "snapshots" / commit).mkdir(parents=True)
    (own / "snapshots" / commit / "config.json").write_text("{}")
    (own / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text(commit)
    return cache


def test_nodes_that_have_different_commits_are_refused(tmp_path: Path) -> None:
    one, same, other = (copy_of(tmp_path / name, commit * 40) for name, commit in (("1", "a"), ("2", "a"), ("3", "b")))
    assert run_on_ranks(2, downloaded, [one, same]) == ["goes on"] * 2
    for said in run_on_ranks(2, downloaded, [one, other]):
        assert said.startswith("rank 1 on node2 has another commit of own/model than rank 0 on node1: 'bbbb")
    for said in run_on_ranks(2, downloaded, [one, tmp_path / "none"]):
        assert said.startswith("on node2 (rank 1): model.path is 'own/model', which is not here, and ")
        assert " did not give it to node2 in 1 try (HF_HUB_OFFLINE is set" in said


RECIPE = """
model: {{path: own/model, tokenizer: own/tokenizer, storage: fp32}}
subspace: {{method: lora, rank: 2}}
data: {{train: own/records, max_length: 48}}
training: {{max_steps: 1, global_batch_size: 4, per_device_train_batch_size: 2}}
deepspeed: {{preset: zero0}}
run: {{output_dir: {folder}/run, report_to: none}}
"""


def test_one_process_of_a_node_asks_for_model_tokenizer_and_data_and_the_others_read_what_it_has(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "records").mkdir()
    make_records(tmp_path / "records" / "train.jsonl", 12)
    hub.add("own/model", model, faults=[503], where="api/")
    hub.add("own/tokenizer", model)
    hub.add("own/records", tmp_path / "records", faults=[200, 502], where="")
    (tmp_path / "config.yaml").write_text(RECIPE.format(folder=tmp_path))
    environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "launch" / "train.py"), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in hub.repositories:
        files = hub.asked("GET", f"{name}/resolve/")
        assert sorted(files) == sorted(set(files)) and files, "each file is read once"
        assert not any(path.endswith("README.md") for path in files)
    assert not hub.asked("GET", "own/tokenizer/resolve/main/model.safetensors")
    # What one process asks: its own question, once more where it failed, and datasets' own.
    questions = [path.removeprefix("/api/") for path in hub.asked("GET", "/api/") if path.count("/") == 4]
    assert questions[:3] == ["models/own/model"] * 2 + ["models/own/tokenizer"]
    assert questions[3:] == ["datasets/own/records"] * (len(questions) - 3) and len(questions) <= 7


READ = """
from dist_subspace.errors import UsageError
from dist_subspace.training.data.sources import open_source
for name, split in (("own/records", "train"), ("own/nothing", "train"), ("own/records", "validation")):
    try:
        print(len(list(open_source(name, split).read())))
    except UsageError as error:
        print("error:", error)
"""


def test_a_data_set_is_asked_for_again_and_what_it_lacks_is_said(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    make_records(tmp_path / "records" / "train.jsonl", 12)
    hub.add("own/records", tmp_path / "records", faults=[503], where="api/")
    environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=LIMIT)
    count, nothing, split = done.stdout.splitlines()
    assert count == "12" and nothing.startswith("error: data.train is 'own/nothing', which is not here, and ")
    assert "in 1 try (HTTP 404: there is no such repository or file); accepted: " in nothing
    assert split.startswith("error: data.train is 'own/records', a Hub data set without a split 'validation' (")
