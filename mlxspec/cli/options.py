"""Options that several verbs share, and the decoder that they describe."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tqdm import tqdm

import mlxspec
from mlxspec import InvalidRequestError, ModelPair, Sampling, SpeculativeDecoder, WriteError
from mlxspec.decoding.decoder import Progress
from mlxspec.decoding.requests import DEFAULT_DRAFT_LENGTH, check_options
from mlxspec.decoding.verification import DEFAULT_RULE, RULES
from mlxspec.models.quantizing import DRAFTER_BITS, QUANTIZATIONS
from mlxspec.models.sharding import Group
from mlxspec.training.recording import RECORDED_TOP_K, Recording, check_folder

LONG_PROMPT = 512  # tokens from which a progress bar is shown
MEASURING = "measuring how long a pass takes on this machine"


class DraftLength(click.ParamType):
    """A number of tokens, or "auto"."""

    name = "int|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Return the number, or "auto"."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f'{value!r} is neither a number nor "auto"', param, ctx)


# The second name of an option is mlx-lm's.
TARGET = click.option(
    "--target", "--model", help="Target model: a folder, hub id or short name.  [default: the built-in demo target]"
)
DRAFTER = click.option(
    "--drafter",
    "--draft-model",
    help="Drafter: a folder, hub id or short name of a draft model or EAGLE head, `lookup` for prompt lookup, or "
    "`none`. `auto` takes the drafter recommended for this target, if there is one, and prompt lookup, and uses the "
    "faster one in each block. Append `+lookup` to a model to do the same with that model.  [default: auto; for the "
    "demo target, its own drafter]",
)
QUANTIZE = click.option(
    "--quantize",
    help="Quantize the target to 4 bits, 8 bits, mxfp4 or nvfp4, and keep the "
    "copy. With `none`, use the target as stored.",
)
QUANTIZE_DRAFTER = click.option(
    "--quantize-drafter", type=click.Choice(DRAFTER_BITS), help="Quantize the draft model to 4 or 8 bits, in memory."
)
DRAFT_LENGTH = click.option(
    "--draft-length",
    "--num-draft-tokens",
    type=DraftLength(),
    default=DEFAULT_DRAFT_LENGTH,
    show_default=True,
    help="Tokens to draft for each pass of the target. With 0 there are no drafts. With auto, mlxspec finds the "
    "fastest length while it decodes.",
)
VERIFICATION = click.option(
    "--verification",
    type=click.Choice(list(RULES)),
    default=DEFAULT_RULE,
    show_default=True,
    help="Rule that accepts or rejects drafted tokens. Every rule keeps the target's distribution. The rule `block` "
    "accepts the most tokens.",
)
# The fields of ``Sampling``: name, type, default and help are the dataclass's.
SAMPLING_OPTIONS = [
    click.option(
        f"--{field.name.replace('_', '-')}",
        *(["--temp"] if field.name == "temperature" else []),
        type=float if field.type is float else int,
        default=field.default,
        show_default=True,
        help=field.metadata["help"],
    )
    for field in fields(Sampling)
]


RECORD = click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Keep each prompt and answer in this folder, with the target's probabilities, to train the drafter on. Only "
    "you can read the files. `mlxspec train recorded` counts and deletes them.",
)
CONTEXT = click.option(
    "--context",
    type=click.IntRange(2),
    help="Context length of the target, in tokens.  [default: the one that its config declares]",
)


def decoder_options(command: Callable) -> Callable:
    """Add the options of ``decoder_from`` to a command."""
    for option in reversed(
        [
            TARGET,
            DRAFTER,
            QUANTIZE,
            QUANTIZE_DRAFTER,
            CONTEXT,
            DRAFT_LENGTH,
            VERIFICATION,
            RECORD,
            *SAMPLING_OPTIONS,
        ]
    ):
        command = option(command)
    return command


def decoder_from(
    tokens: int | None,
    target: str | None,
    drafter: str | None,
    quantize: str | None,
    quantize_drafter: str | None,
    context: int | None,
    draft_length: int | str,
    verification: str,
    record: Path | None = None,
    quiet: bool = False,
    before_weights: Callable[[Any, int | None], None] = lambda tokenizer, context_length: None,
    group: Group | None = None,
    **sampling: Any,
) -> SpeculativeDecoder:
    """Return the decoder that the options describe. Options that need no model are checked before one is loaded.

    Args:
        tokens: Tokens of prompt and answer, for the check whether the models fit into memory. None if not known.
        target: As given on the command line, like the next six.
        drafter: Draft model.
        quantize: How to quantize the target.
        quantize_drafter: How to quantize the draft model.
        context: Maximum number of positions.
        draft_length: Tokens drafted per block, or "auto".
        verification: The rule.
        record: Folder for the answers. The decoder keeps the target's probabilities for it.
        quiet: Print no messages.
        before_weights: As for ``mlxspec.load``.
        group: As for ``mlxspec.load``.
        sampling: The fields of ``Sampling``.
    """
    drawn = Sampling(**sampling)
    check_options(draft_length, verification)
    check_pair(target, drafter, quantize)
    if record and group is not None:
        raise InvalidRequestError("--record needs a target that is whole; leave it out under mlx.launch")
    if record:
        check_folder(record)
    if drafter == "none" and draft_length not in ("auto", 0):
        raise InvalidRequestError(f"--draft-length {draft_length} needs a drafter; leave out --drafter none")
    if not quiet:
        announce_compiling()
    pair = mlxspec.load(
        target,
        drafter,
        quantize=quantize,
        context=tokens,
        context_length=context,
        before_weights=before_weights,
        quantize_drafter=quantize_drafter,
        group=group,
    )
    decoder = SpeculativeDecoder(pair, drawn, draft_length, verification, keep_top_k=RECORDED_TOP_K if record else 0)
    if target and drafter is None and not quiet:
        say_drafter(pair)
    return decoder


class AnswerRecord:
    """Records the answers of a decoder. The first one that cannot be recorded ends it, with one line.

    Args:
        decoder: The decoder, from ``decoder_from``.
        folder: The folder. None to record nothing.
    """

    def __init__(self, decoder: SpeculativeDecoder, folder: Path | None):
        self.decoder = decoder
        self.recording = Recording(folder, decoder.pair.target) if folder else None

    def add(self) -> None:
        """Record the last answer."""
        if self.recording:
            try:
                self.recording.add(*self.decoder.kept_probs())
            except WriteError as error:
                self.recording = None
                click.echo(f"recording has stopped: {error}", err=True)


def check_pair(target: str | None, drafter: str | None, quantize: str | None) -> None:
    """Raise InvalidRequestError for options that contradict each other."""
    if quantize not in (None, "none", *QUANTIZATIONS):
        raise InvalidRequestError(f"--quantize is {quantize}; use one of {', '.join(QUANTIZATIONS)}, none")
    if quantize not in (None, "none") and target is None:
        raise InvalidRequestError("--quantize needs a --target; the demo target is quantized already")
    if drafter == "":
        raise InvalidRequestError("--drafter is empty; name a draft model, lookup, none or auto")
    if target == "":
        raise InvalidRequestError("--target is empty; name a model, or leave it out for the demo")


def announce_compiling() -> None:
    """Say on standard error that MLX will compile its kernels, which it does on Linux the first time it is used."""
    kernels = Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "cpu"  # where MLX keeps them
    if mx.default_device().type == mx.cpu and sys.platform == "linux" and not any(kernels.glob("*.so")):
        click.echo("MLX compiles its kernels for this machine, once; that takes about 20 seconds", err=True)


def say_drafter(pair: ModelPair) -> None:
    """Say on standard error which drafter was chosen, and why it is not the recommended one."""
    note = f" ({pair.drafter_note})" if pair.drafter_note else ""
    name = (
        "prompt lookup" if pair.drafter_name == "lookup" else pair.drafter_name.replace("+lookup", " or prompt lookup")
    )
    click.echo(f"drafting with {name}{note}", err=True)


def calibrate(decoder: SpeculativeDecoder, quiet: bool = False, again: bool = False) -> None:
    """Measure what blocks cost, if the decoder needs that, with a bar on a terminal and one line elsewhere.

    Args:
        decoder: is ready to decode afterwards.
        quiet: show nothing.
        again: measure even if the costs are known.
    """
    if decoder.calibrated and not again:
        return
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal and not quiet:
        click.echo(MEASURING, err=True)
    with tqdm(total=0, desc=MEASURING, disable=quiet or not terminal, leave=False, delay=0.1) as bar:
        decoder.calibrate(lambda done, total: advance(bar, done, total), again)


def advance(bar: tqdm, done: int, total: int) -> None:
    """Set a progress bar."""
    bar.total = total
    bar.update(done - bar.n)


def target_name(target: str | None) -> str:
    """Return the name of a target for users."""
    return target or "demo"


@contextmanager
def prefill_bar(quiet: bool) -> Iterator[Progress]:
    """A progress bar for long prompts, on standard error if that is a terminal. It is made when it is needed."""
    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if total >= LONG_PROMPT:
            if not bars:
                bars.append(tqdm(desc="prompt", unit="tok", disable=quiet or None, leave=False, delay=0.5))
            advance(bars[0], done, total)
            if done == total:
                bars.pop().close()

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()
