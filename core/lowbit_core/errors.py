"""Every error that Lowbit raises on purpose.

    LowbitError                exit 1
    ├── InputError             exit 2   what the user gave is refused; nothing was written
    │   ├── ModelError                  a missing, unreadable or unknown base model
    │   ├── RecipeError                 a recipe that does not parse or does not fit the model
    │   ├── OutputError                 an output directory or disk that cannot take the result
    │   ├── CheckpointError             a checkpoint that is incomplete, tampered with or rejected
    │   └── ConfigError                 a flag, environment variable or file that is wrong
    ├── QualityError           exit 3   the recipe's quality gate rejected the result
    ├── NumericsError          exit 1   a tensor is not finite where it must be
    └── EngineError            exit 1   the engine did not start, died, or does not do what was asked

A message is one line: what was given, what is allowed, what to do next.
"""


class LowbitError(Exception):
    """The root; catching it catches everything that Lowbit raises on purpose."""

    exit_status = 1


class InputError(LowbitError):
    """What the user gave is refused before anything is written."""

    exit_status = 2


class ModelError(InputError):
    """The base model is missing, unreadable, or of an architecture that is not in the table."""


class RecipeError(InputError):
    """The recipe does not parse, has an unknown key, or does not fit the model."""


class OutputError(InputError):
    """The output directory holds something else, or the disk is too small."""


class CheckpointError(InputError):
    """The checkpoint is incomplete, was changed after it was written, or was rejected by its gate."""


class ConfigError(InputError):
    """A flag, an environment variable or a configuration file has a wrong value."""


class QualityError(LowbitError):
    """The recipe's quality gate rejected the result; the checkpoint stays on disk, marked rejected."""

    exit_status = 3


class NumericsError(LowbitError):
    """A weight, scale or statistic is not finite."""


class EngineError(LowbitError):
    """The engine did not start, died, or runs with something else than the checkpoint says."""
