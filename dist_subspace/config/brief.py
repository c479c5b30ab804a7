"""A configuration in a few lines: what differs from the defaults."""

from __future__ import annotations

from dist_subspace.config.schema import Config
from dist_subspace.config.yaml_text import text_of


def brief_lines(config: Config) -> list[str]:
    """YAML in one line a section, of the keys whose values are not the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    return [text_of({section: keys}, in_a_line=True) for section, keys in tree.items() if keys]
