"""The real vLLM, on a CPU, writes what our model writes: from exported adapters, several in one server, and from merged models.
It refuses what an export says that it does not read."""

from __future__ import annotations

import re
import shlex
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dist_subspace as dsub
from dist_subspace.training.data.prompting import Prompt
from tests.serving.servers import completion, models, run_engines, server
from tests.serving.trained import NEW_TOKENS, asked, base_model, train_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LORA = {"method": "lora", "rank": 4}
EXPORTED: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": {"method": "rslora", "rank": 4},
    "pissa": {"method": "pissa", "rank": 4},
    "moslora": {"method": "moslora", "rank": 4},
    "spectral-additive": {"method": "spectral-additive", "rank": 4},
    "ranks-of-their-own": {**LORA, "rank_pattern": {"v_proj": 8, "o_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
}
SCALED = {"storage": "nf4", "dtype": "float32", "rate": 0.05}  # merged is the weight that it was trained with
MERGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dora": ({"method": "dora", "rank": 4}, {}),
    "ssb": ({"method": "ssb"}, SCALED),
    "ssl": ({"method": "ssl"}, SCALED),
    "new-tokens": (LORA, {"marks": ["<|answer|>"]}),
}
# What vLLM says to it; what of it an export says already.
REFUSED = {
    "dora": ("does not yet support DoRA", "vLLM does not read DoRA"),
    "ssl": ("Missing required configuration fields", "vLLM reads LoRA alone"),
    "trained-head": ("modules_to_save", "vLLM reads no modules that were trained in full"),
    "rank-32": ("LoRA rank 32 is greater than max_lora_rank 16", ""),
}


@dataclass(frozen=True)
class Ours:
    """prompts, the ids and the texts of our greedy answers; notes: what the export says."""

    prompts: list[Prompt]
    ids: list[list[int]]
    texts: list[str]
    notes: str = ""


@pytest.fixture(scope="module")
def home(serving_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: the model; NAME: a run; NAME-peft, NAME-merged: what is made of it."""
    folder = tmp_path_factory.mktemp("served")
    base_model(folder / "base")
    return folder


@pytest.fixture(scope="module")
def ours(home: Path) -> dict[str, Ours]:
    made: dict[str, Ours] = {}
    more = {"trained-head": {**LORA, "modules_to_save": ["lm_head"]}, "rank-32": {**LORA, "rank": 32}}
    wished = {name: (subspace, {}) for name, subspace in (EXPORTED | more).items()} | MERGED
    for name, (subspace, changes) in wished.items():
        run = train_adapter(home / "base", home / name, subspace, **changes)
        notes = ""
        if name in EXPORTED or name in REFUSED:
            notes = str(dsub.export_peft(run / "adapter", home / f"{name}-peft", report=None))
        if name in MERGED:
            model, tokenizer = dsub.load(run)
            dsub.merge(model, home / f"{name}-merged", tokenizer=tokenizer, report=None)
        made[name] = Ours(*asked(run), notes)
    return made


@pytest.fixture(scope="module")
def theirs(home: Path, ours: dict[str, Ours]) -> dict[str, Any]:
    """What vLLM writes: of each adapter by name, of the base as "model", of each merged model; or why it does not."""
    prompts = [prompt.ids for prompt in ours["lora"].prompts]
    of_all = {"prompts": prompts, "new_tokens": NEW_TOKENS}
    adapters = {name: str(home / f"{name}-peft") for name in (*EXPORTED, *REFUSED)}
    wishes = [{"model": str(home / "base"), "adapters": adapters, "max_lora_rank": 16} | of_all]
    wishes += [{"model": str(home / f"{name}-merged")} | of_all for name in MERGED]
    with_adapters, *merged = run_engines(home, wishes)
    return {"exported": with_adapters, **{name: found["model"] for name, found in zip(MERGED, merged, strict=True)}}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_adapter_writes_our_tokens(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    assert ours[name].ids != theirs["exported"]["model"], "the adapter changes nothing"
    assert len({tuple(ids) for ids in ours[name].ids}) > 2, "it answers all prompts alike"
    assert theirs["exported"][name] == ours[name].ids


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_writes_our_tokens(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    assert ours[name].ids != theirs["exported"]["model"], "the adapter changes nothing"
    assert theirs[name] == ours[name].ids


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_an_export_says_before(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    error, note = REFUSED[name]
    assert isinstance(theirs["exported"][name], str) and error in theirs["exported"][name]
    assert note in ours[name].notes


def served_by(card: Path, base: Path, folder: Path) -> list[str]:
    """The command that the card shows, with this machine's folders in its places."""
    (line,) = re.findall(r"^vllm (serve .*)$", card.read_text(), re.MULTILINE)
    return shlex.split(line.replace("path/to/this/folder", str(folder)).replace(f"path/to/{base.name}", str(base)))


def test_adapters_beside_one_another_answer_at_once_in_one_server(
    home: Path, ours: dict[str, Ours], theirs: dict[str, Any]
) -> None:
    """By the command of the first one's card, with the other one's folder behind it."""
    command = served_by(home / "lora-peft" / "README.md", home / "base", home / "lora-peft")
    assert "--max-lora-rank" in command and command[-1] == f"adapter={home / 'lora-peft'}"
    names = {"adapter": "lora", "second": "pissa"}
    with server([*command, f"second={home / 'pissa-peft'}"], home) as address:
        assert set(models(address)) == {str(home / "base"), *names}
        wanted = [(who, number) for number in range(len(ours["lora"].prompts)) for who in names]
        with ThreadPoolExecutor(len(wanted)) as pool:  # of both adapters, in the same batches
            prompt = ours["lora"].prompts
            found = list(pool.map(lambda one: completion(address, one[0], prompt[one[1]].text, NEW_TOKENS), wanted))
        base = [completion(address, str(home / "base"), each.ids, NEW_TOKENS)["token_ids"] for each in prompt]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            completion(address, "third", prompt[0].text, 1)
    for (who, number), choice in zip(wanted, found, strict=True):
        assert choice["text"] == ours[names[who]].texts[number]
        assert choice["token_ids"] == ours[names[who]].ids[number]
    assert base == theirs["exported"]["model"]


def test_a_merged_model_is_served_with_its_new_tokens_by_its_card(home: Path, ours: dict[str, Ours]) -> None:
    folder, mine = home / "new-tokens-merged", ours["new-tokens"]
    with server(served_by(folder / "README.md", folder, folder), home) as address:
        found = [completion(address, str(folder), prompt.text, NEW_TOKENS) for prompt in mine.prompts]
        marked = completion(address, str(folder), mine.prompts[0].text + "<|answer|>", NEW_TOKENS)
    assert [choice["token_ids"] for choice in found] == mine.ids
    first = mine.ids[0]
    assert first[0] == max(first) and marked["token_ids"] == first[1:], "the text of a new token is the new token"
