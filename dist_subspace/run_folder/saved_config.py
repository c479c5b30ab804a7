"""RUN/config.yaml as it stands there, for those who need a value of it and not a configuration that is valid today."""

from __future__ import annotations

from typing import Any

import yaml

from dist_subspace.run_folder.folder import RunFolder, StrPath


def saved_sections(run_dir: StrPath) -> dict[str, dict[str, Any]]:
    """The sections by name; a section that is no mapping is left out. Empty where there is no such file, or no YAML in it."""
    try:
        config = yaml.safe_load(RunFolder(run_dir).config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    sections = config.items() if isinstance(config, dict) else ()
    return {name: section for name, section in sections if isinstance(section, dict)}
