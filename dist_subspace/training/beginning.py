"""Where the adapter of a run begins that does not begin at its method's own start: at an adapter that there is already
(`subspace.init_from`). Its weights are taken, its optimizer state is not; and once the run has a checkpoint, that one is read
in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_subspace.api import attach_adapter
from dist_subspace.checkpoint.fingerprint import file_fingerprint
from dist_subspace.checkpoint.state import on_rank_zero_only
from dist_subspace.config.schema import SubspaceSection
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder, read_adapter
from dist_subspace.interchange.description import CONFIG
from dist_subspace.interchange.hub_adapter import adapter_here
from dist_subspace.interchange.loaded_adapter import LoadedAdapter
from dist_subspace.interchange.peft.importing import read_peft
from dist_subspace.interchange.tokenizer_files import tokenizer_of
from dist_subspace.loading.tokenizer import load_tokenizer
from dist_subspace.placement.collectives import broadcast_tensors, on_main
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.subspace import SubspaceConfig, resolve

# Fields that say how it is trained, and nothing about what it computes: they are the configuration's.
_OF_TRAINING = ("dropout", "constraint", "constraint_weight")
# Fields that name layers in many ways: where they name others than the adapter has, the tensors do not fit.
_OF_LAYERS = ("target_modules", "exclude_modules", "modules_to_save")
_OPTIONS_OF_TRAINING = frozenset(
    {
        "lr_ratio",
        "warmup_steps",
        "final_steps",
        "interval",
        "budget",
        "beta1",
        "beta2",
        "power",
        "reduction",
    }
)


@dataclass(frozen=True)
class Beginning:
    """folder: an adapter or a checkpoint; config: what is trained from it; named: what an error calls it; tokens: the ids of
    the new tokens whose rows it holds; texts: theirs, where the adapter's tokenizer is to be had."""

    folder: Path
    config: SubspaceConfig
    named: str
    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] | None = None

    def content(self) -> list[str]:
        """Local: fingerprints of the adapter's weights."""
        return [file_fingerprint(path) for path in sorted(self.folder.glob("*.safetensors"))]

    def joined(self, section: SubspaceSection) -> Beginning:
        """The same with what the configuration's section says about training.

        Raises:
            UsageError: the section contradicts the adapter; both values are named.
        """
        begun, given = self.config, section.model_fields_set
        for name in ("method", "rank", "alpha", "rank_pattern", "alpha_pattern"):
            wanted, held = getattr(section, name), getattr(begun, name)
            if name in given and wanted is not None and wanted != held:
                raise self._contradiction(f"subspace.{name}", wanted, held)
        self._check_options(section.options)
        taken = [*_OF_TRAINING, *(name for name in _OF_LAYERS if name in given)]
        kept = {name: getattr(section, name) for name in taken}
        config = replace(begun, **kept, options={**begun.options, **section.options})
        ids = tuple(begun.new_tokens)
        return replace(self, config=config, tokens=ids, texts=_texts_of(self.folder, ids))

    def _check_options(self, options: Mapping[str, Any]) -> None:
        held = resolve(self.config).settings.options
        for name, value in options.items():
            if name in held and name not in _OPTIONS_OF_TRAINING and value != held[name]:
                raise self._contradiction(f"subspace.options.{name}", value, held[name])

    def _contradiction(self, field: str, wanted: Any, held: Any) -> UsageError:
        return UsageError(
            f"{field} is {wanted!r}, but the adapter of {self.named} has {held!r}; accepted: the same, or leave it out"
        )

    def check_tokens(self, ids: tuple[int, ...], texts: Sequence[str]) -> None:
        """Raises UsageError where model.new_tokens, which have these ids, are others than the adapter's."""
        if ids == self.tokens and self.texts is not None and tuple(texts) != self.texts:
            raise UsageError(
                f"model.new_tokens is {list(texts)}, but the adapter of {self.named} has rows for {list(self.texts)}; accepted: "
                "the same tokens in the same order"
            )
        if ids != self.tokens:
            raise UsageError(
                f"model.new_tokens get the ids {list(ids)}, but the adapter of {self.named} has rows for the new tokens "
                f"{list(self.tokens)}; accepted: the same tokens in the same order"
            )


def find_beginning(
    named: str, checkpoint: tuple[Path, dict[str, Any]] | None, notice: Callable[[str], None]
) -> Beginning | None:
    """Local, rank 0: the adapter that a run begins with, or goes on with.

    Arguments:
        named: `subspace.init_from`.
        checkpoint: the one that the run goes on from, and what it says about how the run began: then `named` is not read, and
            may be gone. None for a new run.

    Raises:
        UsageError: the folder holds no adapter, or the Hub does not give it.
    """
    if checkpoint is None:
        folder = _adapter_in(adapter_here(named, "subspace.init_from"))
        return Beginning(folder, _config_of(folder), f"subspace.init_from ({named})")
    folder, begun = checkpoint
    notice(f"subspace.init_from is not read: the run goes on from {folder.name}")
    if not begun:  # it began at its method's own start
        return None
    return Beginning(folder, SubspaceConfig.of_dict(begun), folder.name)


def attach_beginning(
    model: nn.Module,
    config: SubspaceConfig,
    beginning: Beginning,
    cache: Path,
    progress: Callable[[int, int], None] | None,
) -> nn.Module:
    """Collective: `attach`, and the adapter's weights in the place of the method's own start. Rank 0 reads the folder.

    Raises:
        UsageError: the adapter does not fit the model or the configuration; names subspace.init_from and what does not fit.
    """
    adapter = replace(on_main(_about, beginning.folder), config=config)
    if not adapter.tensors:
        adapter = replace(adapter, tensors=broadcast_tensors(on_rank_zero_only(_tensors_of, beginning.folder)))
    try:
        return attach_adapter(model, adapter, cache=cache, progress=progress)
    except UsageError as error:
        raise UsageError(f"the adapter of {beginning.named} does not fit: {error}") from error


def _adapter_in(folder: Path) -> Path:
    """The folder, or a run's final adapter."""
    inner = RunFolder(folder).adapter
    if (folder / CONFIG).is_file() or not (inner / CONFIG).is_file():
        if not (folder / CONFIG).is_file():
            raise UsageError(
                f"subspace.init_from is {str(folder)!r}, which holds no adapter; accepted: a folder with {CONFIG}, ours or "
                "PEFT's, a checkpoint, a run with an adapter, or a name on the Hub"
            )
        return folder
    return inner


def _config_of(folder: Path) -> SubspaceConfig:
    opened = AdapterFolder(folder)
    return opened.config if opened.ours else read_peft(opened).config


def _texts_of(folder: Path, ids: tuple[int, ...]) -> tuple[str, ...] | None:
    """Local, rank 0: what an adapter's tokenizer calls its new tokens; None where there is none, or it lacks them."""
    source = tokenizer_of(folder) if ids else None
    try:
        tokenizer = load_tokenizer(str(source)) if isinstance(source, Path) else source
    except UsageError:
        return None
    texts = [] if tokenizer is None else tokenizer.convert_ids_to_tokens(list(ids))
    return tuple(texts) if texts and all(texts) else None


def _about(folder: Path) -> LoadedAdapter:
    """Local, rank 0: an adapter that PEFT wrote, or one of ours without its tensors, which may be many."""
    opened = AdapterFolder(folder)
    return opened.without_tensors() if opened.ours else read_peft(opened)


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    return read_adapter(folder).tensors
