"""Set-up of the methods that need a statistic of the frozen matrices: from given factors, from the cache, or made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import broadcast_object, broadcast_tensors, on_main
from dist_subspace.placement.tensors import checksums, overwrite, split_like
from dist_subspace.statistics.cache import FactorCache, key_of
from dist_subspace.statistics.rounds import in_rounds
from dist_subspace.storage import FrozenLinear, FrozenStack
from dist_subspace.subspace import FoldsIntoBase, SetupStatistic, attached, keeps_factors, rebases

Factors = Mapping[str, Tensor]
Frozen = FrozenLinear | FrozenStack
Progress = Callable[[int, int], None]


@dataclass
class Result:
    """What a rank made of a layer: its factors (None: known already), and the base's new matrix (None: it stays)."""

    factors: dict[str, Tensor] | None
    base: Frozen | None


def set_up_statistics(
    model: nn.Module,
    given: Mapping[str, Factors] | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Collective where the model is split, or a process group exists: every part takes its statistic.

    Arguments:
        given: factors by part name (from an adapter's file), the same on every rank; those are not made again.
        cache: a folder of earlier results, for rank 0 alone; written where something had to be made.
        progress: called with (layers done, layers in all).
    """
    parts = {
        name: part
        for name, part in _parts(model).items()
        if isinstance(part, SetupStatistic) and part.setup_statistic != "none"
    }
    if not parts:
        return
    known = {name: dict(factors) for name, factors in (given or {}).items() if factors}
    seed = attached(model).config.seed
    store = None if cache is None else FactorCache(Path(cache))
    keys = _keys(parts, seed) if store is not None else {}
    attached(model).factor_keys.update(keys)
    stored = set(on_main(_stored, store, {n: k for n, k in keys.items() if n not in known}))
    if store is not None:
        on_main(
            _keep_given, store, {keys[name]: (name, dict(factors)) for name, factors in known.items() if name in keys}
        )
    done = 0

    def file_of(name: str) -> Path | None:
        return store.path(keys[name]) if store is not None and name in stored else None

    def give_factors(name: str, factors: Factors) -> None:
        nonlocal done
        with _complete(name, file_of(name)):
            _give_factors(model, parts[name], factors)
        done += 1
        if progress is not None:
            progress(done, len(parts))

    ready = [name for name in parts if (name in known or name in stored) and not rebases(parts[name])]
    for name in ready:
        give_factors(name, known[name] if name in known else _read(store, keys[name]))
    remaining = {name: part for name, part in parts.items() if name not in ready}
    for name in [name for name in remaining if name in stored]:
        known[name] = _read(store, keys[name])

    def work(name: str, part: SetupStatistic, weight: Any) -> Result:
        factors = known.get(name)
        factors_made = _as_sent(part.decompose(weight)) if factors is None else None
        if not (isinstance(part, FoldsIntoBase) and part.rebases):
            return Result(factors_made, None)
        with _complete(name, file_of(name)):
            matrix = part.rebased(factors_made if factors_made is not None else factors or {}, weight)
            return Result(factors_made, part.base.repacked(matrix))

    for name, owner, result in in_rounds(remaining, work, seed):
        factors = known.get(name)
        if factors is None:
            factors = broadcast_tensors(result.factors if result is not None else None, owner)
            if store is not None:
                on_main(store.write, keys[name], name, factors)
        if rebases(remaining[name]):
            _replace_base(remaining[name].base, result.base if result is not None else None, owner)
        give_factors(name, factors)


@contextmanager
def _complete(name: str, file: Path | None) -> Iterator[None]:
    """Raises UsageError where a layer's stored factors lack one, as those of a damaged file may."""
    try:
        yield
    except KeyError as error:
        if file is None:
            raise
        raise UsageError(f"{file} lacks {error} of {name}: it is damaged; delete it, and it is made again") from error


def _keep_given(store: FactorCache, given: Mapping[str, tuple[str, dict[str, Tensor]]]) -> None:
    """Local, rank 0: factors that came with an adapter lie beside those that were made: checkpoints name their files.

    Raises:
        UsageError: the folder holds others under that name, which checkpoints may have been trained with.
    """
    for key, (name, factors) in given.items():
        if not store.has(key):
            store.write(key, name, factors)
            continue
        held = store.read(key)
        if held.keys() != factors.keys() or not all(torch.equal(held[k], factors[k].to(held[k].dtype)) for k in held):
            raise UsageError(
                f"{store.path(key)} holds other factors of {name} than the adapter that the run begins with; choose another "
                "run.output_dir"
            )


def _as_sent(factors: Factors) -> dict[str, Tensor]:
    """Contiguous, so that what is sent and written is no other copy (a decomposition's vectors come transposed)."""
    return {name: tensor.contiguous() for name, tensor in factors.items()}


def kept_files(model: nn.Module, cache: str | Path) -> dict[str, dict[str, str]]:
    """Local, rank 0: the files in the cache that an adapter of this model is not complete without: layer -> file, sha256."""
    parts = _parts(model)
    return _files(model, cache, lambda name: keeps_factors(parts[name]))


def remade_files(model: nn.Module, cache: str | Path) -> dict[str, dict[str, str]]:
    """Local, rank 0: the others (DoRA's row norms), which can be had again from the base: layer -> file, sha256."""
    parts = _parts(model)
    return _files(model, cache, lambda name: not keeps_factors(parts[name]))


def _files(model: nn.Module, cache: str | Path, wanted: Callable[[str], bool]) -> dict[str, dict[str, str]]:
    """A file is read once in the model's life: its name says what it holds, and the other ranks wait at every checkpoint."""
    store, digests = FactorCache(Path(cache)), attached(model).factor_digests
    keys = {name: key for name, key in attached(model).factor_keys.items() if wanted(name)}
    files = {name: store.path(key) for name, key in keys.items()}
    for name, file in files.items():
        if str(file) not in digests:
            digests[str(file)] = store.digest(keys[name])
    return {name: {"file": file.name, "sha256": digests[str(file)]} for name, file in files.items()}


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in attached(model).layers}


def _keys(parts: Mapping[str, SetupStatistic], seed: int) -> dict[str, str]:
    sums = checksums([list(part.base.parameters()) for part in parts.values()])
    return {name: key_of(name, part, total, seed) for (name, part), total in zip(parts.items(), sums, strict=True)}


def _stored(store: FactorCache | None, keys: Mapping[str, str]) -> list[str]:
    return [] if store is None else [name for name, key in keys.items() if store.has(key)]


def _read(store: FactorCache | None, key: str) -> dict[str, Tensor]:
    """Collective: a stored file's tensors on every rank."""
    box: list[dict[str, Tensor]] = []

    def read() -> None:
        assert store is not None  # only a cache can have stored something
        box.append(store.read(key))

    on_main(read)
    return broadcast_tensors(box[0] if box else None)


def _give_factors(model: nn.Module, part: SetupStatistic, factors: Factors) -> None:
    """Local, alike on every rank: the part takes its factors; where the base is split, what it froze is split too."""
    device = next((p.device for p in part.trainables().values()), torch.device("cpu"))
    with torch.no_grad():
        part.set_factors({name: tensor.to(device) for name, tensor in factors.items()})
    bias: nn.Parameter | None = getattr(part, "bias", None)  # a stack's part has none
    base_ids = {id(p) for p in part.base.parameters()} | {id(p) for p in (bias,) if p is not None}
    split_like(model, [p for p in part.parameters() if not p.requires_grad and id(p) not in base_ids])


def _replace_base(base: Frozen, packed: Frozen | None, owner: int) -> None:
    """Collective: the owner's newly packed bytes become the base's, on every rank its own shard of them."""
    packed_tensors = None if packed is None else {name: p.data for name, p in packed.named_parameters(recurse=False)}
    plain: Any = broadcast_object(None if packed is None else packed.plain_values(), owner)
    for name, whole in broadcast_tensors(packed_tensors, owner).items():
        overwrite(base.get_parameter(name), whole)
    base.set_plain_values(plain)
