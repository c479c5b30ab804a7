"""The configuration: YAML and overrides to frozen, typed values. Imports nothing of the package but its errors."""

from dist_subspace.config.load import config_schema, dump_config, load_config
from dist_subspace.config.schema import Config

__all__ = ["Config", "config_schema", "dump_config", "load_config"]
