"""What is pushed to a Hub is fetched back from it, and computes the same; by huggingface_hub itself, from and to a small hub on
this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

import dist_subspace as dsub
from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.training.beginning import find_beginning
from tests.hub_server import HubServer, asked_from_here, hub_server
from tests.ranks import ROOT
from tests.tiny_run import make_model

LIMIT = 240.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("push") / "base", layers=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of a method that PEFT knows, and of one whose form in PEFT is another, after some steps."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for method in ("lora", "ssl"):
        rank = {"rank": 2} if method == "lora" else {}
        model = dsub.attach(
            dsub.load_frozen(base, storage="fp32"),
            dsub.SubspaceConfig(method=method, target_modules=("q_proj",), **rank),
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in dsub.trainable_parameters(model):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        made[method] = dsub.save_adapter(model, folder / method, base)
    return made


# Each line of the input is the arguments of one command, and what is set in its environment; its answer is a line of JSON:
# status, output, what it said. `logits` are those of the base with the adapter that a repository holds.
COMMANDS = """
import contextlib, io, json, os, sys
from dist_subspace.loading import hub
hub.WAITS = (0.05, 0.05)
from dist_subspace.cli import main

def logits(base, name, file):
    import torch
    import dist_subspace as dsub
    model = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), name)
    torch.save(model(torch.arange(12)[None]).logits.detach(), file)
    return 0

for line in sys.stdin:
    arguments, environment = json.loads(line)
    os.environ.update(environment)
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        status = logits(*arguments[1:]) if arguments[0] == "logits" else main(arguments)
    for name in environment:
        del os.environ[name]
    print(json.dumps([status, out.getvalue(), said.getvalue()]), flush=True)
"""
MINE = {"HF_TOKEN": "hf_mine"}


class Shell:
    """A process that has loaded the libraries once, for the commands of a test."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        environment = hub.environment(home, PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        self.errors = (home / "stderr").open("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([sys.executable, "-c", COMMANDS], env=environment, text=True, **pipes)

    def run(self, *words: object, **environment: str) -> tuple[int, str, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([list(map(str, words)), environment]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):
                status, out, said = json.loads(line)
                return status, out, said
        raise AssertionError(Path(self.errors.name).read_text()[-3000:])

    def push(self, *words: object, **environment: str) -> tuple[int, str, str]:
        return self.run("push", *words, **(environment or MINE))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)
        self.errors.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def shell(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    opened = Shell(hub, tmp_path_factory.mktemp("shell"))
    yield opened
    opened.close()


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    model = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), adapter)
    return model(torch.arange(12)[None]).logits.detach()


def card_of(hub: HubServer, name: str) -> str:
    return hub.repositories[name].files["README.md"].decode()


def test_what_was_pushed_is_loaded_by_its_name_and_computes_the_same(
    hub: HubServer, shell: Shell, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    secret = adapters["lora"] / "optimizer.safetensors"
    secret.write_bytes(b"nobody's business")
    pushed = [shell.push(adapters["lora"], "me/mine"), shell.push(adapters["ssl"], "my-lab/scalings", "--json")]
    secret.unlink()
    assert [status for status, _, _ in pushed] == [0, 0], pushed
    assert (
        pushed[0][1].startswith(f"{hub.address}/me/mine/commit/") and 'load_adapter(model, "me/mine")' in pushed[0][1]
    )
    assert "not pushed: optimizer.safetensors" in pushed[0][1] and "hf_mine" not in str(pushed)
    mine, scalings = (hub.repositories[name].files for name in ("me/mine", "my-lab/scalings"))
    assert "optimizer.safetensors" not in mine
    assert mine["adapter_model.safetensors"] == (adapters["lora"] / "adapter_model.safetensors").read_bytes()
    assert not any(name.startswith("peft/") for name in mine), "PEFT reads the adapter itself"
    assert {"peft/adapter_config.json", "peft/adapter_model.safetensors", "dist_subspace.json"} <= scalings.keys()
    assert json.loads(pushed[1][1])["kind"] == "adapter"
    for method, name in (("lora", "me/mine"), ("ssl", "my-lab/scalings")):
        assert shell.run("logits", base, name, tmp_path / "logits.pt")[0] == 0
        assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(base, adapters[method]))
        card = card_of(hub, name)
        assert f'dsub.load_adapter(model, "{name}")' in card and "path/to/this/folder" not in card and is_unedited(card)
        assert str(base) not in card and str(tmp_path) not in card
    assert 'PeftModel.from_pretrained(model, "my-lab/scalings", subfolder="peft")' in card_of(hub, "my-lab/scalings")


def test_a_command_and_a_run_take_the_name_where_they_take_a_folder(
    hub: HubServer, shell: Shell, adapters: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("me/named", adapters["lora"])
    status, out, said = shell.run("export", "me/named", tmp_path / "peft")
    assert status == 0 and "lora as PEFT's LORA" in out, said
    status, out, said = shell.run("inspect", "me/named", "--json")
    assert status == 0 and json.loads(out)["method"] == "lora", said
    with asked_from_here(hub.address, tmp_path / "cache"):
        begun = find_beginning("me/named", None, pytest.fail)
    assert begun is not None and begun.config.method == "lora" and begun.config.rank == 2
    weights = (begun.folder / "adapter_model.safetensors").read_bytes()
    assert weights == (adapters["lora"] / "adapter_model.safetensors").read_bytes()


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["me/mine"], {}, r"NAME is 'me/mine', and HF_TOKEN is not set; accepted: HF_TOKEN with a token that may write"),
    (["mine"], MINE, r"NAME is 'mine' \(ValueError: it is no user/name\); accepted: a name on the Hub, user/name"),
    (["me/a b"], MINE, r"NAME is 'me/a b' \(HFValidationError: "),
    (["you/yours"], MINE, r"did not take it in 1 try \(HTTP 403: the token may not write to 'you'\); accepted: a name under"),
    (["me/mine"], {"HF_TOKEN": "hf_old"}, r"did not take it in 1 try \(HTTP 401: it does not know the token\); accepted: HF_"),
    (["me/whole"], MINE, r"which holds a whole model, and this is an adapter; accepted: another name"),
    (["me/public", "--private"], MINE, r"which is public, and a private one is asked for; accepted: another name"),
    (["me/down"], MINE, r"did not take it in 3 tries \(HTTP 503\); accepted: the same command later"),
]  # fmt: skip


def test_what_the_hub_does_not_take_is_one_sentence(
    hub: HubServer, shell: Shell, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("me/whole", base)
    before = list(hub.writer.messages)
    hub.new_repository("me/public")
    down = hub.new_repository("me/down")
    down.where, down.always = "/commit/", 503
    for words, environment, expected in REFUSED:
        status, out, said = shell.run("push", adapters["lora"], *words, **environment)
        assert (status, out) == (2, ""), (words, said)
        assert re.search(expected, said) and said.count("\n") == 1 and said.startswith("error: "), said
    for path in (
        tmp_path / "nothing",
        tmp_path,
        "me/nobody",
    ):  # no such run, a run without an adapter yet, no such repository
        status, out, said = shell.push(path, "me/mine")
        assert (status, out) == (2, "") and said.startswith("error: PATH is ") and said.count("\n") == 1, said
    assert hub.writer.messages == before and "you/yours" not in hub.repositories


def test_a_push_that_was_broken_off_is_taken_up_and_one_without_news_is_no_commit(
    hub: HubServer, shell: Shell, adapters: dict[str, Path]
) -> None:
    mine = hub.new_repository("me/broken")
    hub.writer.stored.clear()
    hub.requests.clear()
    hub.writer.messages.clear()
    mine.where, mine.faults = "/commit/", [500] * 3
    status, _, said = shell.push(adapters["lora"], "me/broken")
    assert status == 2 and "in 3 tries (HTTP 500)" in said and set(mine.files) == {".gitattributes"}
    sent = hub.asked("PUT", "large")
    assert len(sent) == 1
    assert shell.push(adapters["lora"], "me/broken")[0] == 0 and hub.asked("PUT", "large") == sent
    before = mine.commit
    assert shell.push(adapters["lora"], "me/broken")[0] == 0 and mine.commit == before and len(hub.writer.messages) == 1


def test_what_is_outdated_goes_and_what_people_put_there_stays(
    hub: HubServer, shell: Shell, adapters: dict[str, Path], tmp_path: Path
) -> None:
    assert shell.push(adapters["ssl"], "me/edited")[0] == 0
    files = hub.repositories["me/edited"].files
    files["picture.png"] = b"theirs"
    assert shell.push(adapters["lora"], "me/edited")[0] == 0
    files = hub.repositories["me/edited"].files
    assert not any(name.startswith("peft/") for name in files) and files["picture.png"] == b"theirs"
    edited = files["README.md"].replace(b"tags:", b"license: mit\ntags:") + b"\nMore of it.\n"
    files["README.md"] = edited
    status, _, said = shell.push(adapters["lora"], "me/edited")
    assert status == 0 and said == "README.md of me/edited was edited, and stays as it is\n"
    assert hub.repositories["me/edited"].files["README.md"] == edited
    own = tmp_path / "own"
    shutil.copytree(adapters["lora"], own)
    (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nMine: path/to/this/folder\n")
    assert shell.push(own, "me/edited", "--revision", "mine")[0] == 0
    assert hub.repositories["me/edited"].files["README.md"] == edited
    branch = hub.repositories["me/edited"].revisions["mine"].files["README.md"].decode()
    assert branch == "---\nlicense: apache-2.0\n---\n\nMine: me/edited\n"
    (own / "README.md").write_text("---\ntags: 5\n---\n")
    status, _, said = shell.push(own, "me/edited", "--revision", "mine")
    assert status == 2 and 'the head of README.md is not the Hub\'s: "tags" must be an array of strings' in said


def test_base_and_adapter_are_pushed_as_one_model(
    hub: HubServer, shell: Shell, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    status, out, said = shell.push(adapters["lora"], "me/merged", "--merged", "--private", "--base-model", base)
    assert status == 0, said
    merged = hub.repositories["me/merged"]
    assert merged.private and ": model, " in out
    for name, content in merged.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(
        model(torch.arange(12)[None]).logits, logits_of(base, adapters["lora"]), rtol=1e-4, atol=1e-4
    )
    head = ModelCard(card_of(hub, "me/merged")).data
    assert head.library_name == "transformers" and 'from_pretrained("me/merged")' in card_of(hub, "me/merged")
    status, _, said = shell.push(tmp_path / "back", "me/again")
    assert status == 0 and hub.repositories["me/again"].files.keys() == merged.files.keys(), said
