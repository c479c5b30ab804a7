"""The card as it stands in a repository: with the repository's name, and what was found out since it was written. Local."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_subspace.interchange.card_signature import is_unedited, signed
from dist_subspace.interchange.card_training import license_entries
from dist_subspace.interchange.card_usage import HERE, shown_base, usage
from dist_subspace.interchange.model_card import NO_LICENSE

_USAGE = re.compile(r"## How to load it\n.*?(?=\n\n## |\Z)", re.DOTALL)


def published_card(
    card: str,
    name: str,
    described: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    license: Mapping[str, Any] | None = None,
) -> str:
    """The card for the repository `name`. What a person has edited keeps its head and its words; the place of the files gets its
    name there too.

    Arguments:
        described: of an adapter, what it says; export: its form for PEFT, where that lies beside it.
        license: the entries of the base's own card, which an unedited card without a license takes.
    """
    unedited = is_unedited(card)
    if unedited and described is not None and export is not None:
        section = usage(described, shown_base(described.get("base_model_name_or_path")), None, export)
        card = _USAGE.sub(lambda found: section, card, count=1)
    card = card.replace(HERE, name)
    if unedited and license:
        card = _with_license(card, license_entries(license))
    named = _license_in(card)
    if named is not None:
        card = card.replace(NO_LICENSE, f"{named}.")
    return signed(card) if unedited else card


def _with_license(card: str, license: Mapping[str, Any]) -> str:
    """A card of ours, with these entries where it has no license."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card)
    if not parsed.data.get("license"):
        for entry, value in license.items():
            parsed.data[entry] = value
    return str(parsed)


def _license_in(card: str) -> str | None:
    """What anybody's card calls its license; one that is not understood is the Hub's to refuse."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card, ignore_metadata_errors=True).data
    except Exception:  # a head of other types, or no YAML
        return None
    named = data.get("license_name") or data.get("license")
    return None if named is None else str(named)
