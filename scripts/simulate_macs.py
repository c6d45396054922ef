"""How close the automatic draft policy comes to the best fixed draft length, on the clocks of simulated Macs.

    python scripts/simulate_macs.py
    python scripts/simulate_macs.py --runs 30 --worst 20
    python scripts/simulate_macs.py --profiles DOCTOR.json

The cost of m rows on nine machines is taken from public threads (tests/decoding/mac_profiles.json), or that on one
machine from a file that ``mlxspec doctor`` has written there. A drafter step costs a share of a target step. Each
drafted token is accepted with a probability that the text sets. The real policy decides, two blocks in flight, as in
decoding: it sees a block only after the next one was queued. Nothing is measured here: it is arithmetic with random
numbers of fixed seeds.
"""

import json
import random
import statistics
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click

from mlxspec.decoding.acceptance import MENU
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import MODEL, PLAIN, Choice
from mlxspec.decoding.policy import Automatic

PROFILES = Path(__file__).parent.parent / "tests" / "decoding" / "mac_profiles.json"
TOKENS = 500  # of an answer
STEPS = (0.02, 0.05, 0.1, 0.2)  # seconds of a drafter step, of a target step
READ = 0.03  # seconds of a token that the drafter reads as one of many, of a drafter step
TEXTS: dict[str, Callable[[int], float]] = {
    **{f"acceptance {rate}": (lambda position, rate=rate: rate) for rate in (0.3, 0.5, 0.64, 0.72, 0.8, 0.9)},
    "0.3 and 0.9 by turns of 50 tokens": lambda position: 0.9 if position // 50 % 2 else 0.3,
    "useless for 100 tokens, then 0.8": lambda position: 0.05 if position < 100 else 0.8,
    "prose 0.5, then copying 0.97": lambda position: 0.5 if position < 250 else 0.97,
}


class Case(NamedTuple):
    """One profile, drafter step and text, and how the policy did there."""

    profile: str
    step: float
    text: str
    best: int  # the best fixed draft length, in hindsight
    of_best: float  # the time it takes over the policy's
    of_plain: float  # the time that plain decoding takes over the policy's


def profiles(path: Path = PROFILES) -> dict[str, dict[int, float]]:
    """Return the cost of m rows, relative to one, by the name of the machine."""
    found = {}
    for profile in json.loads(path.read_text())["profiles"]:
        rows = {int(m): cost for m, cost in profile["rows_ms"].items()}
        found[profile["name"]] = {m: cost / rows[1] for m, cost in rows.items()}
    return found


def accepted_tokens(text: str, position: int, length: int, rng: random.Random) -> int:
    return next((i for i in range(length) if rng.random() >= TEXTS[text](position + i)), length)


@cache
def fixed_blocks(text: str, length: int, runs: int) -> float:
    """Return the blocks that an answer takes with a fixed draft length, on average."""
    counts = []
    for seed in range(runs):
        rng, position, blocks = random.Random(seed), 0, 0
        while position < TOKENS:
            position += accepted_tokens(text, position, length, rng) + 1
            blocks += 1
        counts.append(blocks)
    return statistics.mean(counts)


def policy_seconds(costs: BlockCosts, text: str, seed: int) -> float:
    """Return the time of an answer for which the policy decides."""
    policy, rng = Automatic(costs, [MODEL]), random.Random(seed)
    policy.start([1, 2], TOKENS, 0)
    seconds = 0.0
    done = queued = unread = (
        0  # tokens read by the host, tokens of the blocks queued so far, tokens not read by the model
    )
    in_flight: deque[tuple[Choice, int]] = deque()
    proposer = None
    while done < TOKENS:
        while len(in_flight) < 2:
            missing = TOKENS - done
            choice = policy.choose(missing - len(in_flight))
            if in_flight:
                ending = policy.expected_tokens(in_flight[0][0]) > missing - 0.5
                if ending or choice.proposer != proposer:
                    break
            if choice.proposer == MODEL:
                seconds += costs.reading(unread, done)
                unread = 0
            proposer = choice.proposer
            in_flight.append((choice, accepted_tokens(text, queued, choice.length, rng)))
            queued += in_flight[-1][1] + 1
        choice, accepted = in_flight.popleft()
        seconds += costs.block(choice)
        count = min(accepted + 1, TOKENS - done)
        done += count
        unread = 0 if proposer == MODEL else unread + count
        policy.observe(choice, [0] * count, accepted, unread)
    return seconds


def simulate(name: str, rows: dict[int, float], runs: int) -> list[Case]:
    """Return every case of one machine."""
    found = []
    for step in STEPS:
        costs = BlockCosts(rows, draft_step=step, draft_read=READ * step)
        for text in TEXTS:
            fixed = {
                length: fixed_blocks(text, length, runs) * costs.block(Choice(MODEL, length) if length else PLAIN)
                for length in MENU
            }
            best = min(fixed, key=lambda length: fixed[length])
            own = statistics.mean(policy_seconds(costs, text, seed) for seed in range(runs))
            found.append(Case(name, step, text, best, fixed[best] / own, fixed[0] / own))
    return found


@click.command()
@click.option("--runs", default=10, show_default=True, help="Answers per case, with seeds 0, 1, …")
@click.option("--worst", default=10, show_default=True, help="How many of the worst cases to print.")
@click.option("--profiles", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=PROFILES,
              help="Costs of rows: a file that mlxspec doctor has written.  [default: nine machines]")  # fmt: skip
def main(runs: int, worst: int, file: Path) -> None:
    """Print the worst cases by machine, and the worst of all."""
    machines = profiles(file)
    cases = [case for name, rows in machines.items() for case in simulate(name, rows, runs)]
    click.echo(
        "| machine | of the best fixed length, at worst | median | of plain decoding, at worst |\n|---|---|---|---|"
    )
    for name in machines:
        mine = [case for case in cases if case.profile == name]
        of_best = [case.of_best for case in mine]
        click.echo(f"| {name} | {min(of_best):.3f} | {statistics.median(of_best):.3f} | "
                   f"{min(case.of_plain for case in mine):.3f} |")  # fmt: skip
    below_best = sum(case.of_best < 0.95 for case in cases)
    below_plain = sum(case.of_plain < 0.98 for case in cases)
    click.echo(f"\n{len(cases)} cases, {below_best} below 0.95 of the best fixed length, {below_plain} below 0.98 of "
               "plain decoding. The worst:\n")  # fmt: skip
    click.echo("| machine | drafter step | text | best fixed length | of it |\n|---|---|---|---|---|")
    for case in sorted(cases, key=lambda case: case.of_best)[:worst]:
        click.echo(f"| {case.profile} | {case.step} | {case.text} | {case.best} | {case.of_best:.3f} |")


if __name__ == "__main__":
    main()
