"""Errors that the user can correct, as opposed to bugs in mlxspec.

Every message is one line: what was wrong, what was expected, what to do. The command line catches ``MlxspecError`` in
one place, prints the line and exits with status 2.
"""


class MlxspecError(ValueError):
    """Base class: a path, option, model or prompt is wrong."""


class ModelLoadError(MlxspecError):
    """A folder or hub repository cannot be read as a model."""


class UnsupportedModelError(MlxspecError):
    """A model can be loaded but not decoded speculatively."""


class TokenizerMismatchError(MlxspecError):
    """The tokenizers of target and drafter map the same ids to different text."""


class InvalidRequestError(MlxspecError):
    """A prompt, a sampling option or a setting is outside its range."""


class NumericalError(MlxspecError):
    """A model computes NaN or infinity where numbers are needed."""


class TrainingError(MlxspecError):
    """A corpus, recipe or training run cannot continue. What was saved before remains."""


def in_one_line(error: Exception) -> str:
    """Return at most 200 characters of an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split())[:200].rstrip(".: ") or type(error).__name__
