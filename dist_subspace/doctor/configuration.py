"""The configuration of a run as each rank reads it: what a run would refuse, and whether all ranks have the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_subspace.doctor.disks import AT_NEED, EACH_NODE, RANK_0, Use
from dist_subspace.doctor.findings import PACKAGES, REFUSED, REMARK, Finding
from dist_subspace.doctor.hub import cache_folder
from dist_subspace.doctor.needs import needs_text
from dist_subspace.doctor.ranks import Ranks, alike, picked

KIND = "configuration"


def examine(path: str, overrides: list[str], speaks: bool, is_chair: bool) -> dict[str, Any]:
    """What is refused, in sentences; and what others need of the configuration.

    Arguments:
        speaks: this rank does what one rank of a node does; is_chair: what rank 0 alone does.
    """
    from dist_subspace.config import load_config, settings_of_all

    refused: list[str] = []
    found: dict[str, Any] = {"path": path, "refused": refused, "uses": None, "storage": None, "needs": None}
    config: Any = _tried(refused, load_config, path, overrides)
    if config is None:
        return found
    settings = json.dumps(settings_of_all(config), sort_keys=True, default=str)
    training = config.training
    found |= {
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
        "storage": config.model.storage,
        "batch": [training.global_batch_size, training.per_device_train_batch_size],
        "uses": [use.__dict__ for use in uses(config)],
        "hub model": _hub_model(config.model.path),
        "hub revision": config.model.revision,
        "model": None,
    }
    from dist_subspace.training.plan import check_settings

    _tried(refused, check_settings, config)
    if speaks:
        _examine_model(config, found, refused, is_chair)
    return found


def uses(config: Any | None) -> list[Use]:
    """The places that a run uses on this node; those of any run where there is no configuration."""
    from dist_subspace.run_folder.local import local_folder

    cache = Use("hub cache", str(cache_folder()), AT_NEED)
    if config is None:
        own = Use("temporary files", tempfile.gettempdir(), EACH_NODE)
        return [Use("run folders", os.path.abspath("runs"), RANK_0), cache, own]
    from dist_subspace.doctor.needs import data_files

    local = local_folder(config.run.local_dir, config.run.output_dir)
    found = [Use("run folder", os.path.abspath(config.run.output_dir), RANK_0, "run.output_dir"), cache]
    found.append(Use("folder on the node", os.path.abspath(local), EACH_NODE, "run.local_dir"))
    if not _hub_model(config.model.path):
        found.append(Use("model", os.path.abspath(Path(config.model.path).expanduser()), None, "model.path", True))
    for number, path in enumerate(dict.fromkeys(data_files(config))):
        field = "data.eval" if path == config.data.eval else "data.train"
        name = "data" if number == 0 else f"data {number + 1}"
        found.append(Use(name, os.path.abspath(Path(path).expanduser()), None, field, True))
    for field, path in (("data.cache_dir", config.data.cache_dir), ("deepspeed.nvme_path", config.deepspeed.nvme_path)):
        if path is not None:
            found.append(Use(field, os.path.abspath(Path(path).expanduser()), EACH_NODE, field))
    return found


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    if found:
        yield "file", picked(found, lambda facts: facts["path"])
        yield "read", picked(found, lambda facts: "refused" if facts["refused"] else "accepted")
        yield "will write", picked(found, lambda facts: needs_text(facts["needs"]) if facts["needs"] else "")


def judge(ranks: Ranks) -> Iterator[Finding]:
    found = ranks.of(KIND)
    for sentence in dict.fromkeys(sentence for facts in found.values() for sentence in facts["refused"]):
        where = tuple(rank for rank, facts in found.items() if sentence in facts["refused"])
        what, _, accepted = sentence.partition("; accepted")
        do = f"accepted{accepted}" if accepted else "correct the configuration, or what it names"
        yield Finding(KIND, "read", where, what, do, REFUSED)
    for name, field in (("settings", "configuration"), ("model", "model")):
        there = {rank: facts[name] for rank, facts in found.items() if facts.get(name) is not None}
        for _, places in alike(there)[1:]:
            what = f"the {field} is another one than on {ranks.where(alike(there)[0][1])}"
            yield Finding(KIND, "read", tuple(places), what, f"give every node the same {field}", PACKAGES)
    for rank, facts in found.items():
        if "not computed" in facts:
            what = f"what the run will write could not be computed ({facts['not computed']}) and compared with what is free"
            yield Finding(KIND, "will write", (rank,), what, "leave room for some checkpoints", REMARK, breaks=False)
    yield from _of_batch(ranks, found)


def _of_batch(ranks: Ranks, found: dict[int, Any]) -> Iterator[Finding]:
    """Micro-batches that are empty, which cost time alone."""
    batch = next((facts["batch"] for facts in found.values() if facts.get("batch")), None)
    if batch is None or batch[0] is None:
        return
    micro = batch[0] // batch[1]
    rounds = math.ceil(micro / ranks.size)
    if empty := rounds * ranks.size - micro:
        computed = rounds * ranks.size
        what = (
            f"a step has {micro} micro-batches, and {ranks.size} ranks compute {computed}, of which {empty} are empty"
        )
        do = f"a multiple of {ranks.size * batch[1]} as training.global_batch_size leaves no device without work"
        yield Finding(KIND, "read", tuple(found), what, do, REMARK, breaks=False)


def _examine_model(config: Any, found: dict[str, Any], refused: list[str], is_chair: bool) -> None:
    """What is said of the model's files, where they are here already."""
    from dist_subspace.checkpoint.fingerprint import base_fingerprint
    from dist_subspace.doctor.needs import needs
    from dist_subspace.loading.load import local_folder
    from dist_subspace.loading.tokenizer import load_tokenizer
    from dist_subspace.subspace import resolve
    from dist_subspace.training.materials import fitted
    from dist_subspace.training.sections import subspace_config

    folder = local_folder(config.model.path, config.model.revision)
    if folder is None:
        return
    found["model"] = _tried(refused, base_fingerprint, folder)
    _tried(refused, load_tokenizer, str(folder), config.model.tokenizer, config.model.trust_remote_code)
    if not refused and config.subspace.init_from is None:
        _tried(refused, lambda: fitted(folder, config, resolve(subspace_config(config)), lambda sentence: None))
        if is_chair:
            try:
                found["needs"] = needs(config, folder)
            except Exception as error:  # of a model's own code: the run itself may do without
                found["not computed"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def _hub_model(path: str) -> str | None:
    """The name, where the model is one of the Hub."""
    if Path(path).expanduser().is_dir():
        return None
    from dist_subspace.loading.hub import is_hub_name

    return path if is_hub_name(path) else None


def _tried(refused: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """The result; None where it is refused, which is kept in a sentence."""
    try:
        return function(*arguments)
    except ValueError as error:
        sentence = str(error).strip().partition("\n")[0]
        if sentence not in refused:
            refused.append(sentence)
        return None
