"""The errors that mean "the request was wrong", as opposed to a bug in mlxspec.

Every message is one line that names the thing, says what was expected and what to do.
The command line catches ``MlxspecError`` in one place, prints the line and exits with 2.
"""


class MlxspecError(ValueError):
    """Something the caller can put right: a wrong path, option, model or prompt."""


class ModelLoadError(MlxspecError):
    """A model folder or hub repository that cannot be read as a model."""


class UnsupportedModelError(MlxspecError):
    """A model that loads but cannot be decoded speculatively, with the reason."""


class TokenizerMismatchError(MlxspecError):
    """Target and drafter do not mean the same text by the same token ids."""


class InvalidRequestError(MlxspecError):
    """A prompt, sampling or decoding option outside its range."""


class TrainingError(MlxspecError):
    """A corpus, recipe or training run that cannot go on; what was saved before is kept."""


def in_one_line(error: Exception) -> str:
    """At most 200 characters of what an error of a library says; its type where it has no words."""
    return " ".join(str(error).split())[:200].rstrip(".: ") or type(error).__name__
