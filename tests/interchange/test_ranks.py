"""What is written from a model that is split over ranks is what one process writes; a rank that calls alone is told."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.overrides

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.deepspeed.shards import gathered_bytes, is_partitioned
from dist_subspace.placement.tensors import full_numel, resident_bytes
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import attached
from tests.interchange.trained import move
from tests.matrix.tiny import ds_config, global_batch, make_engine, train_step
from tests.ranks import run_on_ranks
from tests.tiny_models import odd_model, save_odd

METHODS = [m for m in ("lora", "ssb", "dora", "pissa", "vera", "bitfit", "svdiff") if m in dsub.methods()]


def loaded(base: str, storage: str, method: str, stage: int, size: int) -> Any:
    config = None if size == 0 else ds_config(stage, world_size=size)
    model = dsub.load_frozen(base, storage=storage, dtype="float32", deepspeed=config)
    rank = 3 if dsub.methods()[method].uses_rank else None
    return move(dsub.attach(model, SubspaceConfig(method=method, rank=rank)))


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def merged(base: str, storage: str, method: str, stage: int, size: int, out: str, kind: str) -> dict[str, Any]:
    model = loaded(base, storage, method, stage, size)
    if size:
        operators = [m for m in model.modules() if isinstance(m, FrozenLinear)]
        split = [is_partitioned(p) for m in operators for p in m.parameters()]
        assert all(split) == any(split) == (stage == 3)
    before = resident_bytes(model.parameters())
    report = dsub.merge(model, out, base=kind, report=None, max_shard_bytes=30_000)
    assert resident_bytes(model.parameters()) == before, "something stayed gathered"
    if size:
        assert gather_objects(report.as_dict()) == [report.as_dict()] * size
    return report.as_dict()


def merged_by_all(base: str, storage: str, stage: int, size: int, out: str, kind: str) -> dict[str, dict[str, Any]]:
    return {m: merged(base, storage, m, stage, size, f"{out}-{m}", kind) for m in METHODS}


@pytest.mark.parametrize(
    ("stage", "storage", "family", "kind"),
    [(3, "nf4", "llama", "dequantised"), (3, "int8", "gpt2", "original"), (2, "nf4", "gpt2", "dequantised")],
)
def test_every_stage_writes_the_bytes_that_one_process_writes(
    stage: int, storage: str, family: str, kind: str, tmp_path: Path
) -> None:
    base = save_odd(tmp_path, family)
    alone = merged_by_all(base, storage, 0, 0, str(tmp_path / "alone"), kind)
    found, _ = run_on_ranks(2, merged_by_all, base, storage, stage, 2, str(tmp_path / "split"), kind)
    for method, report in alone.items():
        assert digest(tmp_path / f"split-{method}") == digest(tmp_path / f"alone-{method}"), method
        assert found[method] | {"folder": ""} == report | {"folder": ""}


def merge_after_training(base: str, method: str, stage: int, out: str) -> tuple[str, float]:
    """Train a step in an engine, merge, and compare the merged model's loss with the adapter's."""
    import transformers

    model = loaded(base, "nf4", method, stage, world().size)
    engine = make_engine(model.train(), ds_config(stage, world_size=world().size))
    train_step(engine, global_batch(0)[: 4 // world().size])
    dsub.merge(model, out, report=None)
    ids = global_batch(1)
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, use_cache=False).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    return type(engine).__name__, float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_inside_an_engine_merges_what_was_trained(stage: int, tmp_path: Path) -> None:
    base = save_odd(tmp_path, "llama")
    for name, error in run_on_ranks(2, merge_after_training, base, "lora", stage, str(tmp_path / "out")):
        assert name == "DeepSpeedEngine" and error < 1e-5


def merge_on(rank: int, base: str, out: str) -> tuple[str, str, float]:
    model = loaded(base, "nf4", "lora", 3, world().size)
    found, started = ("none", ""), time.monotonic()
    if world().rank == rank:
        try:
            dsub.merge(model, out, patience=1.0)
        except UsageError as error:
            found = ("UsageError", str(error))
    else:
        time.sleep(4)
    seconds = time.monotonic() - started
    dsub.merge(model, out, report=None)  # the group still works, and everybody is here now
    return *found, seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_merging_a_split_model_on_one_rank_alone_is_a_sentence_and_no_hang(rank: int, tmp_path: Path) -> None:
    base = save_odd(tmp_path, "llama")
    found = run_on_ranks(2, merge_on, rank, base, str(tmp_path / "out"))
    kind, text, seconds = found[rank]
    assert kind == "UsageError" and seconds < 20 and found[1 - rank][0] == "none"
    assert (
        f"merge was called by rank {rank} of 2, and in 1 seconds not by rank {1 - rank}: every rank must call it"
        in text
    )
    assert (tmp_path / "out" / "config.json").exists()


def merge_into_something(base: str, out: str) -> str:
    model = loaded(base, "nf4", "lora", 3, world().size)
    try:
        dsub.merge(model, out, report=None)
    except UsageError as error:
        return str(error)
    return "no error"


def test_a_refusal_of_rank_0_is_everyones(tmp_path: Path) -> None:
    base = save_odd(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    first, second = run_on_ranks(2, merge_into_something, base, str(tmp_path / "out"))
    assert first == second and "which holds something already" in first


def merge_with_a_progress_that_raises(base: str, out: str) -> str:
    def progress(done: int, total: int) -> None:
        if done == 3:
            raise RuntimeError("the display is gone")

    model = loaded(base, "nf4", "lora", 3, world().size)
    with pytest.raises(RuntimeError) as found:
        dsub.merge(model, out, report=None, progress=progress)
    return str(found.value)


def test_a_progress_that_raises_ends_the_merge_on_every_rank(tmp_path: Path) -> None:
    base = save_odd(tmp_path, "llama")
    first, second = run_on_ranks(2, merge_with_a_progress_that_raises, base, str(tmp_path / "out"))
    assert first == "the display is gone" and second.endswith("failed on rank 0: the display is gone")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


class Watch(torch.overrides.TorchFunctionMode):
    """The most bytes that lie gathered on this rank while tensors are copied."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.most = model, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            self.most = max(self.most, sum(gathered_bytes(p) for p in self.model.parameters() if is_partitioned(p)))
        return func(*args, **(kwargs or {}))


def saved(base: str, method: str, out: str, size: int) -> tuple[int, int, int, int]:
    """Bytes: at most gathered while it was saved, trained, of the factors of the largest part, and of all factors."""
    model = loaded(base, "nf4", method, 3, size)
    watch = Watch(model)
    with watch:
        dsub.save_adapter(model, out)
    parts = [model.get_submodule(name) for name in attached(model).layers]
    factors = [[p for n, p in part.named_parameters() if "spectral" in n] for part in parts]
    each = [sum(full_numel(p) * p.element_size() for p in own) for own in factors]
    return watch.most, sum(full_numel(p) * 4 for p in dsub.trainable_parameters(model)), max(each), sum(each)


@pytest.mark.parametrize("method", [m for m in ("svdiff", "sam-parser") if m in dsub.methods()])
def test_frozen_factors_are_saved_part_by_part_from_rank_0_alone(method: str, tmp_path: Path) -> None:
    base = save_odd(tmp_path, "llama")
    saved(base, method, str(tmp_path / "alone"), 0)
    found = run_on_ranks(2, saved, base, method, str(tmp_path / "split"), 2)
    assert digest(tmp_path / "split") == digest(tmp_path / "alone")
    for rank, (most, trained, largest, everything) in enumerate(found):
        assert 4 * (trained + largest) < everything, "the model is too small to tell"
        assert most <= trained + (largest + 4096 if rank == 0 else 0)  # and a part's bias
    assert found[0][0] > 0


def exported(base: str, out: str, size: int) -> dict[str, dict[str, Any]]:
    """Every form, from a model that is split over the ranks: a LoRA of frozen factors, scalings, PEFT's own, an approximation."""
    found = {}
    for method, rank in (("pissa", None), ("svdiff", 2), ("ssl", None), ("vera", None), ("ssb", 3)):
        if method in dsub.methods():
            model = loaded(base, "nf4", method, 3, size)
            made = dsub.export_peft(model, f"{out}-{method}", approximate_rank=rank, report=None)
            found[method] = made.as_dict() | {"folder": ""}
    return found


def test_an_adapter_on_a_split_model_is_exported_as_on_a_whole_one(tmp_path: Path) -> None:
    base = save_odd(tmp_path, "gpt2")
    alone = exported(base, str(tmp_path / "alone"), 0)
    first, second = run_on_ranks(2, exported, base, str(tmp_path / "split"), 2)
    assert first == second == alone
    for method in alone:
        assert digest(tmp_path / f"split-{method}") == digest(tmp_path / f"alone-{method}"), method


def imported(base: str, folder: str) -> tuple[bool, float]:
    """PEFT's adapter on a model that is split over the ranks, against PEFT's own logits."""
    import peft
    import transformers

    model = dsub.import_peft(
        dsub.load_frozen(base, storage="fp32", deepspeed=ds_config(3, world_size=world().size)), folder
    )
    engine = make_engine(model, ds_config(3, world_size=world().size))  # its hooks gather the weights
    engine.eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    ids = global_batch(1)
    with torch.no_grad():
        ours = engine(input_ids=ids, use_cache=False).logits
        wanted = theirs(input_ids=ids).logits
    split = all(is_partitioned(p) for p in model.parameters() if not p.requires_grad)
    return split, float((ours - wanted).abs().max() / wanted.abs().max())


def test_pefts_adapter_is_read_onto_a_split_model(tmp_path: Path) -> None:
    import peft

    base = save_odd(tmp_path, "llama")
    model = odd_model("llama")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    move(peft.get_peft_model(model, config)).save_pretrained(tmp_path / "peft")
    for split, error in run_on_ranks(2, imported, base, str(tmp_path / "peft")):
        assert split and error < 1e-5
