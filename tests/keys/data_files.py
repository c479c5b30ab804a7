"""The keys of `data` that say which files are read, and where their tokens are kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.keys.begun import begin
from tests.keys.bench import UNSET, Bench
from tests.keys.data_reference import all_trained, answered, assert_same, marked, tokenizer_of, usual
from tests.keys.reference import held_out_loss

PAIRS = [
    {"prompt": 'a "quoted", one', "completion": "é\nof two lines"},
    {"prompt": "0012", "completion": "1.50"},
    {"prompt": "日本", "completion": " blanks "},
]
TEXT = "A line.\n\n  Another one,\twith a tab\nand no end"


def train(bench: Bench) -> None:
    """Every kind of file, as `datasets` reads it."""
    tokenizer, folder = tokenizer_of(bench), bench.folder
    table = datasets.Dataset.from_list(PAIRS)
    table.to_json(folder / "pairs.jsonl")
    table.to_csv(folder / "pairs.csv")
    table.to_parquet(folder / "pairs.parquet")
    (folder / "pairs.json").write_text(json.dumps(PAIRS, indent=1))
    (folder / "pairs.txt").write_text(TEXT)
    given = {"data.format": "completion", "model.tokenizer": marked(bench)}
    for kind in ("json", "jsonl", "csv", "parquet"):
        file = str(folder / f"pairs.{kind}")
        reader: Any = {"csv": datasets.Dataset.from_csv, "parquet": datasets.Dataset.from_parquet}.get(
            kind, datasets.Dataset.from_json
        )
        columns = datasets.Features({name: datasets.Value("string") for name in PAIRS[0]})
        read = reader(file, cache_dir=str(folder / "hf"), features=columns)
        expected = [answered(tokenizer, row["prompt"], row["completion"]) for row in read]
        assert_same(begin(bench, given | {"data.train": file}).rows, expected, kind)
    text = str(folder / "pairs.txt")
    read = datasets.Dataset.from_text(text, cache_dir=str(folder / "hf"), sample_by="document")
    expected = [all_trained(tokenizer, row["text"]) for row in read]
    assert_same(begin(bench, given | {"data.train": text, "data.format": "text"}).rows, expected, "txt")


def train_path(bench: Bench) -> None:
    """All files of a list are read."""
    tokenizer = tokenizer_of(bench)
    files = [bench.write(f"part-{n}.jsonl", [{"text": f"{n} {word}"} for word in ("a", "b")]) for n in range(3)]
    given = {"data.train": [{"path": file} for file in files], "model.tokenizer": marked(bench)}
    expected = [all_trained(tokenizer, f"{n} {word}") for n in range(3) for word in ("a", "b")]
    assert_same(begin(bench, given).rows, expected, "a list of files")


def train_weight(bench: Bench) -> None:
    """A file of weight 2 comes twice an epoch, of one of weight a half another half of it each time."""
    twice = bench.write("twice.jsonl", [{"text": f"twice {n}"} for n in range(3)])
    half = bench.write("half.jsonl", [{"text": f"half {n}"} for n in range(8)])
    weighted = [{"path": twice, "weight": 2.0}, {"path": half, "weight": 0.5}]
    begun = begin(bench, {"data.train": weighted, "training.global_batch_size": 10})
    tokenizer = begun.plan.tokenizer
    seen = []
    for epoch in range(6):
        micro = begun.plan.batches.batch(epoch).rounds
        texts = Counter(tokenizer.decode(m.inputs["input_ids"][0], skip_special_tokens=True) for m in micro if m)
        assert [texts[f"twice {n}"] for n in range(3)] == [2, 2, 2]
        seen.append(frozenset(text for text in texts if text.startswith("half")))
        assert len(seen[-1]) == 4 and all(texts[text] == 1 for text in seen[-1])
    assert len(set(seen)) > 1 and len(frozenset().union(*seen)) > 4, "always the same half"


def eval_(bench: Bench) -> None:
    """A file is evaluated on whole, the last partial micro-batch too; a fraction of the records is never trained on."""
    still = {"training.learning_rate": 1e-30, "training.max_steps": 1, "training.global_batch_size": None}
    batches = {"training.per_device_train_batch_size": 1, "training.per_device_eval_batch_size": 3}
    outcome = bench.run({**still, **batches, "data.eval": bench.held_out})
    evaluated = [row for call in outcome.calls if not call.training for row in call.rows]
    texts = [json.loads(line)["text"] for line in Path(bench.held_out).read_text().splitlines()]
    tokenizer = begin(bench, {}).plan.tokenizer
    rows = [all_trained(tokenizer, text)[0] for text in texts]
    sizes = [len(call.rows) for call in outcome.calls if not call.training and call.rows[0] in rows]
    assert sizes == [3, 3, 1] * len(outcome.evaluations), "micro-batches of data.eval have their own size"
    assert all(evaluated.count(row) == len(outcome.evaluations) for row in rows), "each record once"
    assert outcome.evaluations[-1]["eval_loss"] == pytest.approx(held_out_loss(bench.peft_model(), rows), rel=2e-5)
    begun = begin(bench, {"data.eval": 0.3})
    every = [all_trained(tokenizer, json.loads(line)["text"]) for line in Path(bench.data).read_text().splitlines()]
    assert len(begun.held_out) == round(0.3 * len(every)), "the share of the records that is held out"
    assert_same(begun.held_out + begun.rows, every, "held out and trained on are the whole, and nothing is both")
    assert len(begin(bench, {"data.eval": 0.001}).held_out) == 1, "a fraction is a record at least"
    files = [bench.write(f"half-{n}.jsonl", [{"text": f"{n} {k}"} for k in range(4)]) for n in range(2)]
    several = begin(bench, {"data.train": [{"path": file} for file in files], "data.eval": 0.125})
    assert len(several.held_out) == 1 and len(several.rows) == 7, "a fraction of the records of all files"
    others = [begin(bench, {"data.eval": 0.3, "training.seed": seed}).held_out for seed in (0, 1)]
    assert sorted(others[0]) == sorted(begun.held_out) != sorted(others[1]), "the seed draws what is held out"


def hub_split(bench: Bench) -> None:
    """The split of a Hub data set (here from `datasets`' own cache)."""
    _from_the_hub(bench, "split", "data.train")


def hub_eval_split(bench: Bench) -> None:
    _from_the_hub(bench, "eval_split", "data.eval")


def _from_the_hub(bench: Bench, key: str, field: str) -> None:
    tokenizer, kept = tokenizer_of(bench), datasets.config.HF_DATASETS_CACHE
    files = {part: bench.write(f"{key}-{part}.jsonl", [{"text": f"{part} {n}"} for n in range(3)]) for part in SPLITS}
    cache = bench.folder / f"cache-{key}"
    _as_if_downloaded(files, cache)
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        for part in (UNSET, "extra"):
            begun = begin(bench, {field: "owner/some", f"data.{key}": part, "model.tokenizer": marked(bench)})
            name = {"split": "train", "eval_split": "validation"}[key] if part is UNSET else part
            read = datasets.load_dataset("owner/some", split=name)
            expected = [all_trained(tokenizer, row["text"]) for row in read]
            assert_same(begun.rows if key == "split" else begun.held_out, expected, f"data.{key}")
            assert len(expected) == 3
    finally:
        datasets.config.HF_DATASETS_CACHE = kept


def _as_if_downloaded(files: dict[str, str], cache: Path) -> None:
    """`owner/some` as `datasets` keeps it."""
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    (made,) = (path.parent for path in cache.rglob("dataset_info.json"))
    place = cache / "owner___some" / "default" / "0.0.0" / "0"
    place.parent.mkdir(parents=True)
    made.rename(place)
    for file in place.glob("json-*.arrow"):
        file.rename(place / file.name.replace("json-", "some-"))
    info = place / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"config_name": "default", "dataset_name": "some"}))


SPLITS = ("train", "validation", "extra")


def cache_dir(bench: Bench) -> None:
    """The tokens lie there; unset, in the run's folder; a second run reads them, and other settings have others."""
    records = [{"prompt": word, "completion": word * 2} for word in ("kept", "here")]
    expected = [answered(tokenizer_of(bench), r["prompt"], r["completion"]) for r in records]
    given = usual(bench, records, "completion")
    for place in (bench.folder / "elsewhere", None):
        changes = given | {"data.cache_dir": UNSET if place is None else str(place)}
        begun = begin(bench, changes)
        folder = place or begun.plan.run_dir.tokens
        stored = [np.load(file).tolist() for file in folder.glob("*/ids.npy")]
        assert stored == [[i for ids, _ in expected for i in ids]]
        assert place is None or not begun.plan.run_dir.tokens.exists()
    kept = {file: file.stat().st_mtime_ns for file in (bench.folder / "elsewhere").rglob("*.npy")}
    again = begin(bench, given | {"data.cache_dir": str(bench.folder / "elsewhere")})
    assert_same(again.rows, expected, "a second run")
    assert {file: file.stat().st_mtime_ns for file in (bench.folder / "elsewhere").rglob("*.npy")} == kept
