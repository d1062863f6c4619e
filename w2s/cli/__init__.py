"""The command line. Heavy imports happen inside the commands, so that `w2s --help` answers at once."""

# In the order in which `w2s --help` lists their commands.
from w2s.cli import stages, report, weights, planning, doctor, bench, data, checkpoint  # noqa: F401, I001
from w2s.cli.app import app, main

__all__ = ["app", "main"]
