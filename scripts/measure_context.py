"""Speed over the length of the text: costs of blocks, decoding after a long text, and reading a prompt.

    python scripts/measure_context.py costs TARGET DRAFTER OUT --rounds 5
    python scripts/measure_context.py decode TARGET DRAFTER OUT --text TEXT.txt --tokens 32
    python scripts/measure_context.py prefill TARGET DRAFTER OUT --text TEXT.txt --at 100 --at 3000

All engines run in one process, in interleaved rounds. Each command prints tables of medians and writes each table as a
JSON file and as a picture to OUT, after each length. A † marks a median of fewer than five rounds. TARGET and DRAFTER
are folders, DRAFTER that of a draft model. The prompts are the first tokens of TEXT.txt. The contexts that the models
declare are ignored. Beyond them, only the speed means anything.

Decoding is greedy and no token ends an answer. mlx-lm is measured with ``generate_step`` and
``speculative_generate_step``, which its ``stream_generate`` runs. In ``decode``, all models have read the prompt.
"""

import mlxspec

# isort: split

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding import calibration
from mlxspec.decoding.calibration import READ, Timer, block_state, costs_of, draft_state, drafting, read_state, reading
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL, NONE, PLAIN, Choice, LookupProposer
from mlxspec.decoding.policy import Automatic, DraftPolicy, Fixed
from mlxspec.evaluation.curves import new_figure
from mlxspec.evaluation.engines import PEER
from mlxspec.evaluation.engines import PLAIN as PEER_PLAIN
from mlxspec.evaluation.rounds import by_engine, default_pause, interleaved, ratio, spread

SHORT, LONG = 8, 512  # tokens of a short and of a long answer
Key = tuple[str, int]  # engine and positions
Figures = dict[Key, list[float]]  # one figure for each round
Pieces = Iterator[list[int]]  # the tokens of each pass of the target


class Changing:
    """A policy that stands for another one. So several policies can use one decoder, which reads a text once."""

    def __init__(self) -> None:
        self.policy: DraftPolicy = Fixed(PLAIN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


class Engines:
    """mlxspec with any policy and mlx-lm, on the same models.

    Args:
        pair: Target and draft model.
        draft_length: Draft length γ of all engines with a fixed one.
    """

    def __init__(self, pair: ModelPair, draft_length: int):
        self.pair, self.draft_length = pair, draft_length
        self.fixed = Choice(MODEL, draft_length)
        self.changing = Changing()
        self.decoder = SpeculativeDecoder(pair, Sampling(), policy=self.changing)

    def costs(self) -> BlockCosts:
        """Return the complete table of costs. It is measured first where it is not."""
        costs = calibration.calibrate(self.decoder.compiled)
        return costs if calibration.is_final(self.decoder.compiled) else self.costs()

    def ours(self, policy: DraftPolicy, prompt: list[int], tokens: int) -> Pieces:
        """Return an answer of mlxspec."""
        self.changing.policy = policy
        return (block.tokens for block in self.decoder.blocks(prompt, tokens))

    def plain(self, prompt: list[int], tokens: int, cache: list[Any] | None = None) -> Pieces:
        """Return an answer of mlx-lm without a drafter."""
        stream = generate_step(mx.array(prompt), self.pair.target, max_tokens=tokens, prompt_cache=cache)
        return ([token] for token, _ in stream)

    def peer(self, prompt: list[int], tokens: int, cache: list[Any] | None = None) -> Pieces:
        """Return an answer of mlx-lm's speculative decoding. ``cache`` ends with the draft model's layers."""
        options = {"num_draft_tokens": self.draft_length, "max_tokens": tokens, "prompt_cache": cache}
        piece: list[int] = []
        for token, _, drafted in speculative_generate_step(
            mx.array(prompt), self.pair.target, self.pair.drafter, **options
        ):
            piece.append(token)
            if not drafted:
                yield piece
                piece = []
        if piece:
            yield piece

    def caches(self, prompt: list[int]) -> tuple[list[Any], list[Any]]:
        """Return mlx-lm's caches of the target and of the draft model after all tokens of a prompt but the last.

        They are copies of the decoder's, so a long text is read once.
        """
        with closing(self.ours(Fixed(self.fixed), prompt, LONG)) as pieces:
            next(pieces)
        state = self.decoder._state
        found = []
        for model, buffers in ((self.pair.target, state.target), (self.pair.drafter, state.drafter)):
            found.append(make_prompt_cache(model))
            for cache, layer in zip(found[-1], buffers, strict=True):
                keys, values = (mx.contiguous(part[:, :, : len(prompt) - 1]) for part in layer)
                mx.eval(keys, values)
                cache.state = keys, values, len(prompt) - 1
        return found[0], found[1]


def read(target: str, drafter: str, text: Path | None = None, count: int = 0) -> tuple[ModelPair, list[int]]:
    """Return the pair with no tokens that end an answer and without limits, and the first tokens of a text."""
    pair = mlxspec.load(target, drafter)
    tokens = pair.tokenizer.encode(text.read_text()) if text else []
    if len(tokens) < count:
        raise click.ClickException(f"{text} has {len(tokens)} tokens; give a text of at least {count}")
    return replace(pair, tokenizer=None, context_length=2**31, drafter_context_length=2**31), tokens[:count]


def seconds_to_first(pieces: Pieces) -> float:
    """Return the seconds until the first tokens. The answer ends there."""
    start = time.perf_counter()
    with closing(pieces):
        next(pieces)
        return time.perf_counter() - start


def rate_after_first(pieces: Pieces) -> float:
    """Return the tokens per second of all passes but the first, which ends the reading of the prompt."""
    next(pieces)
    start = time.perf_counter()
    count = sum(len(piece) for piece in pieces)
    return count / (time.perf_counter() - start)


def measure(runs: Mapping[Key, Callable[[], float]], rounds: int, limit: float = math.inf) -> Figures:
    """Return the figures of interleaved rounds.

    Args:
        runs: Each engine runs once in each round.
        rounds: Number of rounds after the first one, which is thrown away.
        limit: Seconds for these rounds. There are fewer if they take longer, by the time of the first one. If not even
            one fits, the first one counts.
    """

    def engine(run: Callable[[], float]) -> Callable[[int], float]:
        def once(number: int) -> float:
            figure = run()
            mx.synchronize(generation_stream)  # what an engine has queued must not slow down the next one
            mx.synchronize()
            return figure

        return once

    engines = {key: engine(run) for key, run in runs.items()}
    start = time.perf_counter()
    first = list(interleaved(engines, 1, warm_up=0, pause=default_pause()))
    fitting = int(min(rounds, limit / (time.perf_counter() - start)))
    found = by_engine(interleaved(engines, fitting, warm_up=0, pause=default_pause()) if fitting else first)
    for (name, at), figures in found.items():
        click.echo(f"{at} positions, {name}: {spread(figures).median:.4g}, rounds: {len(figures)}", err=True)
    return found


def parts_of(found: Figures) -> tuple[list[str], list[int], dict[Key, float]]:
    """Return the engines, the numbers of positions and the medians."""
    names, places = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    return names, places, {key: spread(figures).median for key, figures in found.items()}


def write(out: Path, name: str, label: str, found: Figures, **more: Any) -> None:
    """Write the figures as JSON and as a picture.

    Args:
        out: The folder.
        name: Name of the files.
        label: What the figures are.
        found: The figures.
        more: More entries for the JSON file.
    """
    out.mkdir(parents=True, exist_ok=True)
    names, places, medians = parts_of(found)
    figures = [{"engine": engine, "positions": at, "rounds": rounds} for (engine, at), rounds in found.items()]
    (out / f"{name}.json").write_text(json.dumps({"unit": label, "figures": figures, **more}, indent=1) + "\n")
    figure = new_figure((7, 4))
    axis = figure.subplots()
    prefixes, kinds = (list(dict.fromkeys(engine.rpartition(": ")[part] for engine in names)) for part in (0, 2))
    for engine in names:
        prefix, _, kind = engine.rpartition(": ")
        style = "--" if engine.startswith("mlx-lm") else ("-", ":", "--", "-.")[prefixes.index(prefix) % 4]
        color = f"C{kinds.index(kind)}"
        axis.plot(places, [medians[engine, at] for at in places], style, marker=".", color=color, label=engine)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{at:,}" for at in places])
    axis.set(xlabel="positions", ylabel=label, ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(out / f"{name}.png", dpi=90)


def table(label: str, found: Figures, over: str = "") -> None:
    """Print a table of medians.

    Args:
        label: What the figures are.
        found: The figures.
        over: An engine to whose figures the others are compared, "" for none.
    """
    names, places, medians = parts_of(found)
    click.echo(f"\n| {label} | " + " | ".join(f"{at:,}" for at in places) + " |\n|" + "---|" * (len(places) + 1))
    for engine in names:
        cells = [f"{medians[engine, at]:.3g}" + "†" * (len(found[engine, at]) < 5) for at in places]
        if over and engine != over:
            cells = [
                f"{cell}: {ratio(found[engine, at], found[over, at])}" for cell, at in zip(cells, places, strict=True)
            ]
        click.echo(f"| {engine} | " + " | ".join(cells) + " |")


def models(command: Callable[..., None]) -> Callable[..., None]:
    """Add the parameters that all commands have."""
    command = click.option("--rounds", default=5, show_default=True)(command)
    command = click.argument("out", type=click.Path(path_type=Path))(command)
    return click.argument("target")(click.argument("drafter")(command))


def positions(*default: int) -> Callable[[Any], Any]:
    """Return the option of the numbers of positions."""
    return click.option("--at", multiple=True, type=int, default=default, show_default=True, help="Positions.")


text = click.option("--text", type=click.Path(exists=True, path_type=Path), required=True, help="The prompt.")
limit = click.option("--limit", default=150.0, show_default=True, help="Seconds for the rounds at one length.")
draft_length = click.option("--draft-length", default=3, show_default=True, help="Of the fixed draft length.")


@click.group()
def main() -> None:
    """Measure speed over the length of the text."""


@main.command()
@models
@positions(256, 1024, 2048, 4096, 8192, 16384)
@click.option("--from", "from_far", multiple=True, type=int, default=[1024, 4096], show_default=True,
              help="Predict from the first capacity and this one.")  # fmt: skip
def costs(target: str, drafter: str, out: Path, rounds: int, at: tuple[int, ...], from_far: tuple[int, ...]) -> None:
    """Milliseconds of a block over the capacity of the caches, and what the cost table predicts.

    "rows 5" is a block of five rows without drafting, "draft 4" a draft of four tokens by the draft model, and "read"
    its reading of 128 tokens.
    """
    compiled = SpeculativeDecoder(read(target, drafter)[0]).compiled
    lookup = LookupProposer(PromptLookup(), compiled.target.vocab_size)
    blocks = {"rows 1": (compiled[PLAIN], compiled.proposers[NONE]),
              "rows 5": (compiled.block(lookup, Choice(LOOKUP, 4)), lookup)}  # fmt: skip
    draft, timers = drafting(compiled, 4), {}
    for capacity in at:
        for name, (block, proposer) in blocks.items():
            state = partial(block_state, compiled, proposer, capacity)
            timers[name, capacity] = Timer(block, state)
        timers["draft 4", capacity] = Timer(draft, partial(draft_state, compiled, capacity))
        before = capacity - at[0]  # positions before the tokens that the draft model reads
        timers["read", capacity] = Timer(reading(compiled, before), partial(read_state, compiled, before))
    with compiled.weights.protected():
        found = measure({key: lambda timer=timer: 1000 * timer() for key, timer in timers.items()}, rounds)
    medians = {key: spread(figures).median for key, figures in found.items()}
    first = {name: medians[name, at[0]] for name, _ in medians}
    for far in from_far:
        line = costs_of(first | {f"long {name}": medians[name, far] for name in first}, far, far)
        for capacity in at:
            there = line.at_length(capacity)
            values = {
                "rows 1": there.verify(1),
                "rows 5": there.verify(5),
                "draft 4": there.draft_once + 4 * there.draft_step,
                "read": READ * (line.draft_read + (capacity - at[0]) * line.position_read),
            }
            for name, value in values.items():
                found[f"predicted from {far:,}: {name}", capacity] = [value] * rounds
    write(out, "costs", "ms", found)
    table("ms", found)


@main.command()
@models
@positions(256, 1024, 2048, 4096, 8192, 16384)
@text
@draft_length
@limit
@click.option("--tokens", default=32, show_default=True, help="Tokens that an engine decodes in a round.")
def decode(
    target: str,
    drafter: str,
    out: Path,
    rounds: int,
    at: tuple[int, ...],
    text: Path,
    draft_length: int,
    limit: float,
    tokens: int,
) -> None:
    """Tokens per second of decoding after a prompt, and the ratio to mlx-lm plain."""
    pair, ids = read(target, drafter, text, max(at))
    engines, found, accepted = Engines(pair, draft_length), Figures(), {}
    policies = {
        "mlxspec plain": Fixed(PLAIN),
        f"mlxspec γ = {draft_length}": Fixed(engines.fixed),
        "mlxspec auto": Automatic(engines.costs(), [MODEL]),
    }
    for length in sorted(at):
        prompt = ids[:length]
        target_cache, drafter_cache = engines.caches(prompt)

        def peer(engine: Callable[..., Pieces], cache: list[Any], prompt=prompt) -> float:
            rate = rate_after_first(engine(prompt[-1:], tokens, cache))
            for layer in cache:
                layer.trim(layer.offset - len(prompt) + 1)
            return rate

        def ours(name: str, prompt=prompt, length=length) -> float:
            rate = rate_after_first(engines.ours(policies[name], prompt, tokens))
            stats = engines.decoder.stats
            accepted[f"{name}, {length}"] = {"block_efficiency": stats.block_efficiency, "blocks_by": stats.blocks_by}
            return rate

        runs = {(name, length): partial(ours, name) for name in policies}
        runs[PEER_PLAIN, length] = partial(peer, engines.plain, target_cache)
        runs[PEER, length] = partial(peer, engines.peer, target_cache + drafter_cache)
        found |= measure(runs, rounds, limit)
        write(out, "decode", "tokens/s", found, last_round=accepted)
    table("tokens/s", found, PEER_PLAIN)
    for name, last in accepted.items():
        click.echo(f"{name}: block efficiency {last['block_efficiency']:.2f}, blocks {last['blocks_by']}")


@main.command()
@models
@positions(100, 300, 1000, 3000, 8000)
@text
@draft_length
@limit
def prefill(
    target: str, drafter: str, out: Path, rounds: int, at: tuple[int, ...], text: Path, draft_length: int, limit: float
) -> None:
    """Tokens of a prompt per second until the first token, and the ratio to mlx-lm plain."""
    pair, ids = read(target, drafter, text, max(at))
    engines, seconds, drafts = Engines(pair, draft_length), Figures(), {}
    known = engines.costs()
    for length in at:
        prompt = ids[:length]

        def peer(engine: Callable[..., Pieces], prompt=prompt) -> float:
            return seconds_to_first(engine(prompt, LONG))

        def ours(name: str, policy: Callable[[], DraftPolicy], tokens: int, prompt=prompt) -> float:
            engines.decoder.forget()
            taken = seconds_to_first(engines.ours(policy(), prompt, tokens))
            drafts[f"{name}, {len(prompt)}"] = MODEL in engines.decoder.stats.blocks_by
            engines.decoder.forget()
            return taken

        auto = partial(Automatic, known, [MODEL])  # a new one for each run, as these answers end after one block
        policies = {
            "mlxspec plain": (partial(Fixed, PLAIN), LONG),
            f"mlxspec γ = {draft_length}": (partial(Fixed, engines.fixed), LONG),
            f"mlxspec auto, {SHORT} tokens": (auto, SHORT),
            f"mlxspec auto, {LONG} tokens": (auto, LONG),
        }
        runs = {(name, length): partial(ours, name, *policy) for name, policy in policies.items()}
        runs[PEER_PLAIN, length] = partial(peer, engines.plain)
        runs[PEER, length] = partial(peer, engines.peer)
        seconds |= measure(runs, rounds, limit)
        rates = {(name, at): [at / one for one in figures] for (name, at), figures in seconds.items()}
        write(out, "prefill", "prompt tokens/s", rates, drafter_has_read=drafts)
        write(out, "first_token", "seconds to the first token", seconds)
    table("prompt tokens/s", rates, PEER_PLAIN)
    table("seconds to the first token", seconds)
    for name, has_read in drafts.items():
        if "auto" in name:
            click.echo(f"{name}: the draft model has {'' if has_read else 'not '}read the prompt")


if __name__ == "__main__":
    main()
