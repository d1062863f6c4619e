"""The YAML files of the default configurations, installed as the package `w2s.configs`."""
