"""The configuration of a run: YAML and `key=value` overrides become one frozen, typed object, or one clear sentence."""

from __future__ import annotations

from dist_subspace.config.load import config_schema, dump_config, fill_unset, load_config, settings_of_all
from dist_subspace.config.schema import Config

__all__ = ["Config", "config_schema", "dump_config", "fill_unset", "load_config", "settings_of_all"]
