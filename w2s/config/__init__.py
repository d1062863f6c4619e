"""Typed configuration: sections, composition from YAML files, overrides, checks."""

from w2s.config.sections import Config

__all__ = ["Config"]
