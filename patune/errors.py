"""The errors patune raises on purpose: one line that names the argument and the way out."""


class PatuneError(Exception):
    """Something failed; the command line prints the message and exits with `exit_status`."""

    exit_status = 1


class UsageError(PatuneError, ValueError):
    """What was asked for is wrong: an unknown GPU, kernel or option value."""

    exit_status = 2


class DatabaseError(PatuneError):
    """The tuning database is locked, read-only, corrupt or of a newer schema."""


class WorkerError(PatuneError):
    """The measuring process could not be started or kept alive."""
