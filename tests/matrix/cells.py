"""One cell of the matrix (storage x method x ZeRO stage x ranks x layer kind), run to the end, and what was seen of it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, advance, attach, disabled, load_adapter, load_frozen, merge, save_adapter
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.optimizer_state import read_state, step_count, write_state
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import full_numel, gathered, kept_bytes, resident_bytes
from dist_subspace.storage import FrozenLinear, storage_info
from dist_subspace.subspace import (
    SubspaceLinear,
    method_class,
    methods,
    named_trainables,
    parameter_groups,
    trainable_parameters,
)
from dist_subspace.subspace.core.collect import GradientCollector
from dist_subspace.subspace.core.schedule import late_factors_of
from tests.matrix import tiny

RANK = 3


@dataclass(frozen=True)
class Cell:
    storage: str
    double_quant: bool
    method: str
    stage: int
    ranks: int
    family: str
    reentrant: bool

    def __str__(self) -> str:
        nested = "-double" if self.double_quant else ""
        checkpoint = "reentrant" if self.reentrant else "non-reentrant"
        return f"{self.storage}{nested}-{self.method}-zero{self.stage}-{self.ranks}ranks-{self.family}-{checkpoint}"

    @property
    def dtype(self) -> torch.dtype:
        """Packed storages compute in float32 here, where equality is sharp; float storages in their own type."""
        return storage_info(self.storage).dtype or torch.float32


@dataclass
class Seen:
    """What one rank saw. Bytes are of frozen parameters on this rank; losses are of this rank's rows, and gradients (of the
    last step) are of their mean."""

    error: str | None = None
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # LoRA-Dash's U, V by layer
    start_difference: float = 0.0
    frozen_unchanged: bool = False
    unmoved: list[str] = field(default_factory=list)
    not_split: list[str] = field(default_factory=list)
    wrong_shards: list[str] = field(default_factory=list)
    whole: int = 0
    shards: int = 0
    resident: int = 0
    peak: int = 0
    forwards: int = 0
    backwards: int = 0
    broken: int = 0
    whole_int8: list[str] = field(default_factory=list)
    round_trip: bool = False
    reload_difference: float = 0.0
    state_restored: bool = False
    merge_difference: float = 0.0


def all_cells(storages: list[str], methods: list[str]) -> list[Cell]:
    """The full product."""
    kinds = [(s, d) for s in storages for d in ((False, True) if storage_info(s).bits == 4 else (False,))]
    axes = itertools.product(kinds, methods, (0, 1, 2, 3), (1, 2), ("llama", "gpt2"), (False, True))
    return [Cell(*kind, *rest) for kind, *rest in axes]  # type: ignore[call-arg]


def covering(cells: list[Cell], asked: list[Cell]) -> list[Cell]:
    """A sample in which every pair of values of two axes occurs, and the cells that are asked for."""
    chosen = list(asked)
    rest = [cell for cell in cells if cell not in asked]
    wanted = {pair for cell in rest for pair in _pairs(cell)}.difference(*map(_pairs, asked))
    while wanted:
        best = max(rest, key=lambda cell: len(wanted.intersection(_pairs(cell))))
        chosen.append(best)
        rest.remove(best)
        wanted.difference_update(_pairs(best))
    return chosen


@functools.cache  # asked for every cell at every choice
def _pairs(cell: Cell) -> set[tuple[Any, ...]]:
    values = asdict(cell)
    values["storage"] = (values["storage"], values.pop("double_quant"))
    values["placement"] = (cell.stage, cell.ranks)
    return set(itertools.combinations(sorted(values.items(), key=lambda item: item[0]), 2))


def run_cells(cells: list[Cell], models: str, work: str) -> list[Seen]:
    """Every cell, in one process group. A cell that fails on all ranks alike is reported, and the next one runs.

    `models` holds the models' folders; adapters and merged models are written into `work`.
    """
    seen = []
    for cell in cells:
        found = Seen()
        try:
            _run(cell, Path(models), str(Path(work) / f"adapter-of-{cell}"), found)
        except Exception:
            found.error = traceback.format_exc()
        seen.append(found)
    return seen


def _run(cell: Cell, folder: Path, adapter: str, seen: Seen) -> None:
    rank, size = world().rank, world().size
    model = _load(cell, folder, tiny.ds_config(cell.stage, world_size=size))
    attach(model, subspace(cell))
    model.gradient_checkpointing_enable({"use_reentrant": cell.reentrant})  # type: ignore[operator]
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    config = tiny.ds_config(cell.stage, trainable_numel=trained, world_size=size)
    engine = tiny.make_engine(model, config, lambda parameters, lr: tiny.adam(parameter_groups(model, lr), lr))
    frozen = tiny.frozen_parameters(model)
    seen.start_difference = _difference_to_base(engine, model)
    before, moved = _digest(frozen), {n: t.clone() for n, t in _whole(named_trainables(model)).items()}
    watch, collector = tiny.Watch(model), GradientCollector(named_trainables(model))
    engine.train()
    for step in range(tiny.STEPS):
        collector.take()
        seen.losses.append(tiny.train_step(engine, tiny.own_batch(step, rank, size)))
        advance(model, step + 1, tiny.STEPS)
    seen.gradients = collector.take()
    seen.directions = {n: (m.dash_U, m.dash_V) for n, m in model.named_modules() if hasattr(m, "dash_U")}
    seen.forwards, seen.backwards, seen.broken, seen.peak = watch.forwards, watch.backwards, watch.broken, watch.peak
    _look_at_bytes(seen, frozen, size)
    seen.whole_int8 = _whole_int8(model)
    seen.frozen_unchanged = _digest(frozen) == before
    after = _whole(named_trainables(model))
    seen.unmoved = [name for name, tensor in after.items() if torch.equal(tensor, moved[name])]
    seen.state_restored = _state_comes_back(engine, model)
    _round_trip(cell, folder, adapter, engine, seen)
    if methods()[cell.method].mergeable:
        _merge(adapter + "-merged", engine, seen)
    engine.destroy()


def _state_comes_back(engine: Any, model: nn.Module) -> bool:
    """Masters and moments, overwritten and written again: bit by bit what they were."""
    named = named_trainables(model)
    steps = step_count(engine)
    state = {key: tensor.clone() for key, tensor in read_state(engine, named).items()}
    write_state(engine, named, {key: torch.zeros_like(tensor) for key, tensor in state.items()}, 0)
    emptied = read_state(engine, named)
    write_state(engine, named, state, steps)
    back = read_state(engine, named)
    whole = _whole(named)
    alike = all(torch.equal(whole[name], state[f"{name}.master"].to(whole[name].dtype)) for name in named)
    return not any(t.any() for t in emptied.values()) and all(torch.equal(back[k], state[k]) for k in state) and alike


def _merge(folder: str, engine: Any, seen: Seen) -> None:
    """The merged model, loaded by transformers alone, says what the adapted one says."""
    from transformers import AutoModelForCausalLM

    ids = tiny.global_batch(9)
    engine.eval()
    with torch.no_grad():
        adapted = engine(input_ids=ids, use_cache=False).logits.float()
        merge(engine.module, folder, dtype=torch.float32)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        seen.merge_difference = float((merged(input_ids=ids, use_cache=False).logits - adapted).abs().max())


def subspace(cell: Cell) -> SubspaceConfig:
    """In 16 bits with a smooth activation: at a kink a rounding error becomes a whole token's share of a gradient."""
    smooth = cell.dtype != torch.float32 and "activation" in methods()[cell.method].options
    return SubspaceConfig(method=cell.method, rank=RANK, options={"activation": "tanh"} if smooth else {})


def _load(cell: Cell, folder: Path, config: dict[str, Any] | None) -> nn.Module:
    return load_frozen(
        folder / cell.family,
        storage=cell.storage,
        double_quant=cell.double_quant,
        deepspeed=config,
        dtype=cell.dtype,
        device="cpu",
    )


def _difference_to_base(engine: Any, model: nn.Module) -> float:
    ids = tiny.own_batch(0, 0, world().size)
    engine.eval()
    with torch.no_grad():
        attached = engine(input_ids=ids, use_cache=False).logits.float()
        with disabled(model):
            base = engine(input_ids=ids, use_cache=False).logits.float()
    return float((attached - base).abs().max())


def _look_at_bytes(seen: Seen, frozen: dict[str, nn.Parameter], size: int) -> None:
    seen.whole, seen.shards = tiny.whole_bytes(frozen), tiny.shard_bytes(frozen, size)
    seen.resident = resident_bytes(frozen.values())
    seen.not_split = [name for name, p in frozen.items() if not is_partitioned(p)]
    expected = {name: -(-full_numel(p) // size) * p.element_size() for name, p in frozen.items()}
    seen.wrong_shards = [name for name, p in frozen.items() if kept_bytes(p) != expected[name]]


def _whole_int8(model: nn.Module) -> list[str]:
    """Names of tensors that the int8 operators hold anywhere (parameters, buffers, attributes) as large as the matrix."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.storage == "int8":
            held = {**module._parameters, **module._buffers, **vars(module)}
            numel = module.in_features * module.out_features
            found += [f"{name}.{key}" for key, t in held.items() if isinstance(t, Tensor) and t.numel() >= numel]
    return found


def _whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def _digest(parameters: dict[str, nn.Parameter]) -> str:
    content = hashlib.sha256()
    for tensor in _whole(parameters).values():
        content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _round_trip(cell: Cell, folder: Path, adapter: str, engine: Any, seen: Seen) -> None:
    """The saved adapter on a model that was never split: the same tensors, the same logits."""
    ids = tiny.global_batch(9)
    engine.eval()
    with torch.no_grad():
        trained = engine(input_ids=ids, use_cache=False).logits.float()
        saved = adapter_tensors(engine.module)
        save_adapter(engine.module, adapter)
        fresh = load_adapter(_load(cell, folder, None), adapter)
        again = fresh.eval()(input_ids=ids, use_cache=False).logits.float()
    back = adapter_tensors(fresh)
    seen.round_trip = back.keys() == saved.keys() and all(torch.equal(back[k], saved[k]) for k in saved)
    seen.reload_difference = float((trained - again).abs().max())


class PlainBase(nn.Module):
    """A dense matrix under ordinary autograd, in the place of a frozen operator."""

    is_float = True
    matrix: Tensor

    def __init__(self, operator: FrozenLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = operator.in_features, operator.out_features
        self.register_buffer("matrix", operator.dense(dtype))
        self.bias = operator.bias

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.matrix.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix.to(x.dtype), None if self.bias is None else self.bias)  # type: ignore[arg-type]


@dataclass
class Reference:
    """Losses by step and row, and the gradients of the last step: of the trained, and of the whole weights where a method
    chooses directions of theirs."""

    losses: list[list[float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weight_gradients: dict[str, Tensor] = field(default_factory=dict)


def reference(cell: Cell, folder: Path) -> Reference:
    """The same training in one process without DeepSpeed, in float64 where the storage allows: a method that merges computes
    `x W'ᵀ` with its own dense formula under ordinary autograd, one that does not runs its product form on dense matrices."""
    model = _load(cell, folder, None)
    attach(model, subspace(cell))
    wide = torch.float64 if cell.dtype == torch.float32 else cell.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            parent = model.get_submodule(name.rpartition(".")[0])
            plain = PlainBase(module, wide)
            if isinstance(parent, SubspaceLinear):
                plain.bias = None  # it moved to the method's layer
            setattr(parent, name.rpartition(".")[2], plain)
            if isinstance(parent, SubspaceLinear) and parent.info.mergeable:
                parent.transform = functools.partial(_dense_form, parent)  # type: ignore[method-assign]
    model.to(wide) if wide == torch.float64 else None
    optimizer = tiny.adam(parameter_groups(model, tiny.RATE), tiny.RATE)
    collector = GradientCollector(named_trainables(model))
    model.train()
    found = Reference()
    watched = {
        name.removesuffix(".base"): module
        for name, module in model.named_modules()
        if isinstance(module, PlainBase) and late_factors_of(method_class(cell.method))
    }
    for step in range(tiny.STEPS):
        collector.take()
        for plain in watched.values():
            plain.matrix.requires_grad_(step == tiny.STEPS - 1)
        found.losses.append(_reference_step(model, optimizer, tiny.global_batch(step)))
        advance(model, step + 1, tiny.STEPS)
    found.gradients = collector.take()
    found.weight_gradients = {n: m.matrix.grad.double() for n, m in watched.items() if m.matrix.grad is not None}
    return found


def _dense_form(part: SubspaceLinear, x: Tensor) -> Tensor:
    matrix: Tensor = part.base.matrix  # type: ignore[attr-defined]
    return nn.functional.linear(x, part.merged(matrix if matrix.dtype == torch.float64 else matrix.float()).to(x.dtype))


def _reference_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> list[float]:
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    flat = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    )
    rows = flat.view(len(ids), -1).mean(1)
    optimizer.zero_grad()
    rows.mean().backward()
    optimizer.step()
    return rows.tolist()
