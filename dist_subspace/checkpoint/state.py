"""What a checkpoint holds: the adapter, the optimizer by parameter name, and where the run stands. Nothing depends on the
number of ranks.

If the process dies while a checkpoint is written, the folder never gets its name (store.py). If it dies while one is read,
nothing has changed on disk.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.checkpoint.store import newest_whole, write_checkpoint
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import READABLE, adapter_tensors, write_adapter
from dist_subspace.interchange.base_model import identify_base
from dist_subspace.interchange.description import OWN, WEIGHTS, read_description
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.placement.collectives import agreed, broadcast_tensors, on_main, world
from dist_subspace.placement.edits import set_counters
from dist_subspace.placement.optimizer_state import MASTER
from dist_subspace.placement.protocol import Engine
from dist_subspace.placement.tensors import full_numel, gathered
from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder, StrPath
from dist_subspace.run_folder.manifest import verify
from dist_subspace.run_folder.trainer_state import TrainerState, read_trainer_state, write_trainer_state
from dist_subspace.statistics import kept_files, remade_files
from dist_subspace.subspace import attached, frozen_in_file, named_trainables
from dist_subspace.subspace.core.peft_words import PREFIX


def save_checkpoint(
    run_dir: RunFolder,
    model: nn.Module,
    engine: Engine,
    state: TrainerState,
    base_model: str | None,
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Collective: gather by name, then rank 0 writes `checkpoint-<step>` in one rename.

    Arguments:
        before: called on rank 0 first; what a checkpoint must not be found without is on disk when it returns.
    """
    tensors = adapter_tensors(model, factors=False)
    described = adapter_config(model, base_model)
    optimizer = engine.read_state(named_trainables(model)) | schedule_tensors(model)

    def write(folder: Path) -> None:
        before()
        identify_base(described, base_model, lambda folder: state.fingerprints["model"])
        described[OWN]["factors"] = kept_files(model, run_dir.factors)
        described[OWN]["statistics"] = remade_files(model, run_dir.factors)
        write_adapter(folder, tensors, described)
        file = CheckpointFolder(folder).optimizer
        save_file(optimizer, file)
        file.chmod(READABLE)
        write_trainer_state(folder, state)

    return Path(on_main(write_checkpoint, run_dir, state.step, write))


def find_checkpoint(
    run_dir: StrPath, resume: str | None, report: Callable[[str], None]
) -> tuple[Path, TrainerState] | None:
    """Local, rank 0: the checkpoint to continue from, and its state; None to begin anew.

    Arguments:
        resume: `auto` for the newest whole one, a folder for that one, `none` or None for a fresh start.

    Raises:
        UsageError: for a named folder that is not a whole checkpoint.
    """
    if resume in (None, "none"):
        return None
    if resume == "auto":
        folder = newest_whole(run_dir, report)
    else:
        folder = Path(resume)
        reason = verify(folder) if folder.is_dir() else f"{resume} is no folder"
        if reason is not None:
            raise UsageError(f"checkpoint.resume is {resume!r}, which is no whole checkpoint: {reason}")
    return None if folder is None else (folder, read_trainer_state(folder))


def check_same_run(folder: Path, stored: Mapping[str, str], now: Mapping[str, str], allowed: list[str]) -> None:
    """Refuse to continue a run of another base model, method or data set, by name.

    Raises:
        UsageError: naming what differs, and the override.
    """
    for what, fingerprint in now.items():
        if stored.get(what) != fingerprint and what not in allowed:
            raise UsageError(
                f"{folder} was made with another {what} (stored {stored.get(what, 'none')[:12]}, now {fingerprint[:12]}); "
                f"choose another run.output_dir, or set checkpoint.allow_different=[{what}]"
            )


def check_factors(folder: Path, model: nn.Module, cache: Path) -> None:
    """Local, rank 0: the statistics that the model has taken are those that the checkpoint was trained with.

    Raises:
        UsageError: a factor file was replaced, or lost and made again with another result, as another machine's SVD may.
    """
    ours = read_description(folder)[OWN]
    stored = (ours.get("factors") or {}) | (ours.get("statistics") or {})  # an older checkpoint has the first alone
    now = kept_files(model, cache) | remade_files(model, cache)
    for layer, entry in stored.items():
        if now.get(layer) != entry:
            raise UsageError(
                f"{cache / entry['file']} is not the file that {folder.name} was trained with (sha256 {entry['sha256'][:12]}): "
                "put the run's own factors back, or choose another run.output_dir"
            )


def restore(engine: Engine, model: nn.Module, folder: Path, state: TrainerState) -> None:
    """Collective: put master weights, moments, step counters and the loss scale back, after a first step has made the moments
    (and counted as one for the scale).

    Raises:
        UsageError: frozen random factors came out otherwise than in the checkpoint.
    """
    _check_frozen(model, folder)
    trainables = named_trainables(model)
    sizes = on_main(_optimizer_sizes, folder, trainables)
    tensors = StoredState(CheckpointFolder(folder).optimizer, sizes, list(trainables))
    engine.write_state(trainables, tensors, state.optimizer_steps)
    engine.restore_scaler(state.loss_scaler)
    _restore_schedule(model, folder, state, tensors)


class SentInGroups(Mapping[str, Tensor]):
    """Tensors that rank 0 alone has. Each is sent to all ranks when it is asked for, with those that follow it: another rank
    holds no more of them than `GROUP` bytes, or one tensor. Every rank asks for the same in the same order.

    Arguments:
        sizes: bytes of each tensor. first: the parameters in whose order tensors will be asked for.
    """

    GROUP = 64 << 20

    def __init__(self, sizes: Mapping[str, int], first: Sequence[str]) -> None:
        self._sizes = sizes
        place = {name: number for number, name in enumerate(first)}
        owners = {key: next((stem for stem in _stems(key) if stem in place), "") for key in sizes}
        self._order = sorted(sizes, key=lambda key: place.get(owners[key], len(place)))
        self._places = {key: number for number, key in enumerate(self._order)}
        self._here: dict[str, Tensor] = {}

    def sent(self, keys: list[str]) -> dict[str, Tensor]:
        """Collective: these tensors on every rank."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> Tensor:
        """Collective."""
        start = self._places[key]
        if key not in self._here:
            self._here, keys, size = {}, [key], self._sizes[key]  # the old ones go before the new ones come
            for other in self._order[start + 1 :]:
                size += self._sizes[other]
                if size > self.GROUP:
                    break
                keys.append(other)
            self._here = self.sent(keys)
        return self._here[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class StoredState(SentInGroups):
    """The tensors of a file that rank 0 alone reads."""

    def __init__(self, file: Path, sizes: Mapping[str, int], first: Sequence[str]) -> None:
        super().__init__(sizes, first)
        self._file = file

    def sent(self, keys: list[str]) -> dict[str, Tensor]:
        return broadcast_tensors(on_rank_zero_only(_read_tensors, self._file, keys))


def _stems(key: str) -> Iterator[str]:
    """What may be the name of a tensor's parameter, the longest first: `NAME` of `NAME.exp_avg`, and of `NAME.absmax1.counts`."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def method_state(model: nn.Module) -> dict[str, Any]:
    """Where the method's schedule stands, for `TrainerState.method`."""
    schedule = attached(model).schedule
    return {} if schedule is None else schedule.state()


def schedule_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a schedule has made of gradients (AdaLoRA's importance), on the CPU; alike on every rank."""
    schedule = attached(model).schedule
    tensors = {} if schedule is None else schedule.tensors()
    return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}


def _restore_schedule(model: nn.Module, folder: Path, state: TrainerState, tensors: Mapping[str, Tensor]) -> None:
    """Collective: the schedule goes on from where the checkpoint's stood."""
    if attached(model).schedule is not None:
        kept = broadcast_tensors(on_rank_zero_only(adapter_by_part, folder))
        restore_schedule(model, state.method, state.optimizer_steps, ChainMap(kept, tensors))  # type: ignore[arg-type]


def restore_schedule(
    model: nn.Module, state: Mapping[str, Any], optimizer_steps: int, tensors: Mapping[str, Tensor]
) -> None:
    """Collective where `tensors` is: the method's schedule, if it has one, goes on from where it stood; what it counts anew from
    a step on is counted so again.

    Arguments:
        state, tensors: of `method_state` and `schedule_tensors`, and the parts' own by `PART.name`.
    """
    schedule = attached(model).schedule
    if schedule is None:
        return
    schedule.restore(state, tensors)
    if schedule.begun is not None:
        set_counters(schedule.late_parameters(), optimizer_steps - schedule.begun)


def adapter_by_part(folder: Path) -> dict[str, Tensor]:
    """Local: an adapter's tensors by part and suffix, without the prefix of files."""
    with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
        return {key.removeprefix(PREFIX): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


def _check_frozen(model: nn.Module, folder: Path) -> None:
    """Collective: what the file holds beside the trained tensors (LoRA-FA's A) was drawn here as it was drawn there."""
    frozen = {file_key(n, suffix): p for n, m in model.named_modules() for suffix, p in frozen_in_file(m).items()}
    if not frozen:
        return
    stored = broadcast_tensors(on_rank_zero_only(_read_tensors, folder / WEIGHTS, list(frozen)))
    with gathered(frozen.values()), agreed("comparing frozen factors"):
        for key, parameter in frozen.items():
            if not torch.equal(parameter.detach().cpu(), stored[key].to(parameter.dtype)):
                raise UsageError(
                    f"{folder.name} holds another {key} than this machine draws from the same seed; continue from it with "
                    "load_adapter, or where the run began"
                )


def _read_tensors(file: Path, keys: list[str]) -> dict[str, Tensor]:
    with safe_open(file, framework="pt", device="cpu") as handle:
        return {key: handle.get_tensor(key) for key in keys}


def on_rank_zero_only(function: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor] | None:
    """Collective: rank 0's result, None elsewhere; an error is everyone's."""
    kept: list[dict[str, Tensor]] = []

    def run() -> None:
        kept.append(function(*args))

    on_main(run)
    return kept[0] if world().is_main else None


def _optimizer_sizes(folder: Path, trainables: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Bytes of each tensor of the optimizer's file, which fits the parameters."""
    file = CheckpointFolder(folder).optimizer
    with safe_open(file, framework="pt", device="cpu") as handle:
        shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    absent = [name for name in trainables if f"{name}.{MASTER}" not in sizes]
    if absent:
        raise UsageError(f"{file} has no state for {absent[0]}; it belongs to another method or base model")
    for name, parameter in trainables.items():
        stored, here = sizes[f"{name}.{MASTER}"], full_numel(parameter)
        if stored != here:
            raise UsageError(
                f"{file} has {stored:,} values for {name}, which has {here:,} here; it belongs to another rank, "
                "or to another base model"
            )
    return {key: 4 * numel for key, numel in sizes.items()}  # float32
