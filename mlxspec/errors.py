"""Errors that the user can correct, as opposed to bugs in mlxspec.

Every message is one line: what was wrong, what was expected, what to do. The command line catches ``MlxspecError`` in
one place, prints the line and exits with status 2.
"""

import errno
import re

REQUEST_NUMBER = re.compile(r"\(Request ID: [^)]*\)")


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


class DisagreementError(InvalidRequestError):
    """The processes of ``mlx.launch`` have loaded different things, or one of them could not load something."""


class ProcessError(MlxspecError):
    """Another process of ``mlx.launch`` has stopped, so this one cannot continue."""


class InUseError(InvalidRequestError):
    """Another process is using a folder."""


class WriteError(MlxspecError):
    """A file or folder cannot be written, such as on a full disk. What it held before remains."""


class TrainingError(MlxspecError):
    """A corpus, recipe or training run cannot continue. What was saved before remains."""


def in_one_line(error: Exception, room: int = 200) -> str:
    """Return an error's message on one line, or its type if it has no message.

    A message longer than ``room`` characters ends after a sentence, or else after a word and "...". Request
    numbers in the hub's messages are left out.
    """
    text = " ".join(REQUEST_NUMBER.sub("", str(error)).split())
    if len(text) > room:
        start = text[: room + 1]
        sentence = start.rfind(". ")
        text = start[:sentence] if sentence > room // 3 else f"{start[: start.rfind(' ')].rstrip(' .,:;')} ..."
    return (text if text.endswith("...") else text.rstrip(".: ")) or type(error).__name__


def advice_for(error: OSError) -> str:
    """Return what a user can do about a file or folder that cannot be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "change its permissions or choose another folder"
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
        return "choose a shorter or plainer name"
    return "check the path and the disk"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or MLX, on any of its devices, could not allocate memory."""
    signs = ("unable to allocate", "attempting to allocate", "insufficient memory", "out of memory")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)
