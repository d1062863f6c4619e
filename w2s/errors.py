"""The errors that a user meets: one line that says what was wrong, the value and the fix."""

FREE_SPACE = "free some space or choose another folder with run.root=FOLDER"
"""What helps where the system refuses to write."""


class W2SError(Exception):
    """A failure with a message meant for the user. The command line prints it without a traceback."""

    exit_code = 1


class UserError(W2SError):
    """A user's mistake: exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a combination of values that the configuration does not allow."""


class DataError(UserError):
    """Shards, images or captions that are missing or cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class MissingPackageError(UserError):
    """An optional package that a feature needs and that is not installed."""


class StopRun(W2SError):
    """Training was asked to stop (SIGTERM or Ctrl-C) and has saved its state.

    Attributes:
        signal_number: the signal that asked for it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
