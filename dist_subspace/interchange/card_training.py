"""What a card may say of a training, in words of the Hub. Local; no hub is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_subspace.loading.hub import is_hub_name

# Our names of figures -> the Hub's, where it has another (https://huggingface.co/metrics).
_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_NO_METRICS = ("loss",)  # figures that are none of the Hub's metrics
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Training:
    """What is known of how an adapter was trained; nothing of it need be.

    facts: rows of a table in their order, None is left out, and `name` is the card's heading. datasets: hub names of what it was
    trained on. figures: of the evaluation, by our names (`loss`, `f1`), measured on `measured_on`. picture: a file beside the
    card. license: the entries of the base's own card.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    picture: str | None = None
    license: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The Hub's names of the figures."""
        return [hub_metric(name) for name in self.figures if is_hub_metric(name)]


def hub_metric(name: str) -> str:
    return _METRICS.get(name, name)


def is_hub_metric(name: str) -> bool:
    return name not in _NO_METRICS


def data_name(source: str | Path) -> str:
    """What a card calls a source of samples: a hub name, or a file's name without the folders of this machine."""
    return str(source) if is_data_set(source) else Path(source).name


def is_data_set(source: str | Path) -> bool:
    """Whether it is a data set of the Hub and no file."""
    path = Path(source)
    return is_hub_name(str(source)) and not path.suffix and not path.exists()


def license_of(base: Path | None) -> dict[str, Any]:
    """What the card in a base model's folder says of its license; empty where there is none, or it cannot be read."""
    from huggingface_hub import ModelCard

    card = None if base is None else base / "README.md"
    if card is None or not card.is_file():
        return {}
    try:
        said = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card that somebody wrote by hand may be anything
        return {}
    return license_entries(said)


def license_entries(said: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a card's entries that say its license."""
    return {name: said[name] for name in _LICENSE if said.get(name)} if said.get("license") else {}
