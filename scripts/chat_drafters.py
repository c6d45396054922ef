"""Compare drafters of a chat model: where they start, which loss trains them, what their step costs.

    python scripts/chat_drafters.py starts TARGET ANSWERS OUT
    python scripts/chat_drafters.py losses TARGET ANSWERS START OUT --seeds 3
    python scripts/chat_drafters.py heads TARGET ANSWERS OUT --steps 100
    python scripts/chat_drafters.py costs TARGET ANSWERS DRAFTER
    python scripts/chat_drafters.py tasks TARGET --prompts DOLLY.jsonl --prompts SPEC_BENCH.jsonl DRAFTER

ANSWERS is a folder that `mlxspec train distill` wrote. Its last documents are held out. The acceptance rate is
α = Σ min(p, q) at temperature 1, the mean over the positions of the held-out answers. OUT keeps what is finished, so a
command that is repeated continues.
"""

import mlxspec  # noqa: F401  first, so that MLX uses OpenBLAS

# isort: split

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.evaluation.curves import new_figure
from mlxspec.evaluation.rounds import by_engine, interleaved, ratio
from mlxspec.models.drafter import EMBEDDING, Drafter
from mlxspec.models.eagle import Eagle, fitting_parts
from mlxspec.models.parts import run_with_states
from mlxspec.models.quantizing import dequantized, rounded
from mlxspec.models.reading import read_config, read_lazily
from mlxspec.training import stages
from mlxspec.training.batched_answers import sample_answers
from mlxspec.training.batches import Batches
from mlxspec.training.documents import document_masks
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import (
    DRAFT_STEPS,
    AnyDrafter,
    Batch,
    DraftRows,
    Objective,
    eagle_objective,
    layers_read,
    objective,
    weighted_sums,
)
from mlxspec.training.prompts import read_prompts
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from mlxspec.training.warm_start import EagleStart, WarmStart, token_counts, warm_start

ALL, TABLES, NOTHING = "all weights", "tables", "nothing"  # what a drafter copies from the target
# Name -> what is copied, which layers, and the share of the heads and neurons that is kept.
STARTS = {
    "random weights, 2 layers": (NOTHING, (0, -1), None),
    "random weights, 4 layers": (NOTHING, (0, 1, -2, -1), None),
    "tables of the target, 4 random layers": (TABLES, (0, 1, -2, -1), None),
    "2 layers: first, last": (ALL, (0, -1), None),
    "2 layers: first two": (ALL, (0, 1), None),
    "4 layers: first two, last two": (ALL, (0, 1, -2, -1), None),
    "4 layers: first four": (ALL, (0, 1, 2, 3), None),
    "4 layers, 2/3 of the width": (ALL, (0, 1, -2, -1), 2 / 3),
}
# Name -> loss, and the share of the weights that follows the chance that START's token was rejected.
VARIANTS = {
    **{name: (name, 0.0) for name in ("ce", "kld", "tvd", "tvd++")},
    "tvd, half by rejection": ("tvd", 0.5),
    "tvd, all by rejection": ("tvd", 1.0),
}
TOP_K = 64  # tokens that the teacher stores for each position


class HeldOut:
    """Answers that are not trained on, with the target's probabilities for K tokens at each position."""

    def __init__(self, target: nn.Module, documents: list[tuple[np.ndarray, np.ndarray]], tokens: mx.array):
        self.documents, self.probs = documents, []
        for ids, mask in documents:
            logits = target(mx.array(ids[:-1])[None])[0][self.places(mask)].astype(mx.float32)
            self.probs.append(mx.softmax(logits, axis=-1)[:, tokens])
            mx.eval(self.probs[-1])

    @staticmethod
    def places(mask: np.ndarray) -> mx.array:
        """Positions whose next token belongs to the answer."""
        return mx.array(np.flatnonzero(mask[1:]))

    def acceptance_rate(self, drafter: Drafter, columns: mx.array | None = None) -> float:
        """Mean of Σ min(p, q). With ``columns``, q is limited to these columns of the head."""
        total = count = 0.0
        for (ids, mask), p in zip(self.documents, self.probs, strict=True):
            hidden = drafter.model(mx.array(ids[:-1])[None])[0][self.places(mask)]
            logits = drafter.lm_head(hidden)
            if columns is not None:
                logits, p = logits[:, columns], p[:, columns]
            overlap = mx.minimum(p, mx.softmax(logits, axis=-1)).sum()
            total, count = total + overlap.item(), count + len(p)
        return total / count


def split(answers: Path, target: Target, out: Path, held_out: int) -> tuple[TokenShards, list]:
    """Return shards of all documents but the last ones, and a third of the last ones as a list."""
    documents = list(TokenShards(answers / "tokens").documents())
    folder = out / "training"
    if not (folder / "index.json").exists():
        with ShardWriter(folder, target.vocab_size, target.tokenizer_fingerprint) as writer:
            for ids, mask in documents[:-held_out]:
                writer.add(ids, mask)
            writer.finish()
    return TokenShards(folder), documents[-held_out::3]


def make_start(name: str, target: Target, training: TokenShards, vocabulary: int) -> Drafter:
    """Return the drafter of a row of STARTS."""
    copied, layers, share = STARTS[name]
    sizes = {}
    if share:
        group = target.config["hidden_size"] // target.config["num_key_value_heads"]
        sizes = {
            "hidden_size": round(share * target.config["num_key_value_heads"]) * group,
            "intermediate_size": round(share * target.config["intermediate_size"]),
        }
    shared = copied != NOTHING and not share
    start = WarmStart(layers, vocabulary_size=vocabulary, share_embedding=shared, **sizes)
    drafter, _ = warm_start(target, start, training)
    if copied != ALL:
        mx.random.seed(0)
        kept = {"d2t"} | ({EMBEDDING, "lm_head.weight", "model.norm.weight"} if copied == TABLES else set())
        fresh = [(name, w) for name, w in tree_flatten(Drafter(drafter.config).parameters()) if name not in kept]
        drafter.load_weights(fresh, strict=False)
    return drafter


def unchanged(goal: Objective, teacher: CachedTeacher) -> Objective:
    """Return the objective itself."""
    return goal


def trained(
    drafter: Drafter,
    target: Target,
    training: TokenShards,
    loss: str,
    folder: Path,
    settings: TrainingSettings,
    report: Callable[[int], None] = lambda step: None,
    change: Callable[[Objective, CachedTeacher], Objective] = unchanged,
) -> None:
    """Train a drafter in place, with stored probabilities of the target. ``change`` may replace the objective."""
    batches = Batches([training], [1.0], settings.length, settings.batch, settings.seed)
    teacher = None
    if loss != "ce":
        teacher = CachedTeacher(target.model, batches, target.vocab_size, TOP_K, 1.0, target.fingerprint)
    goal = objective(Loss(loss), teacher)
    Trainer(
        drafter,
        change(goal, teacher) if teacher else goal,
        batches,
        settings,
        folder,
        teacher=teacher,
        report=lambda step, metrics: report(step),
    ).run()


@click.group()
def main() -> None:
    """Compare drafters of a chat model."""


@main.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=150, show_default=True, help="Steps of kld, and again as many of tvd.")
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--vocabulary", default=6144, show_default=True)
@click.option("--held-out", default=96, show_default=True)
@click.option("--every", default=50, show_default=True, help="Steps between points of the curve.")
def starts(
    target_folder: str, answers: Path, out: Path, steps: int, batch: int, length: int, vocabulary: int, held_out: int,
    every: int,
) -> None:  # fmt: skip
    """Train each start on the same rows: acceptance rate over trained positions."""
    target = Target(target_folder)
    training, documents = split(answers, target, out, held_out)
    lines = out / "starts.jsonl"
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    held: HeldOut | None = None
    for name in STARTS:
        if any(entry["start"] == name for entry in done):
            continue
        drafter = make_start(name, target, training, vocabulary)
        held = held or HeldOut(target.model, documents, drafter.output_tokens)
        curve = [[0, held.acceptance_rate(drafter)]]
        began = time.monotonic()
        for phase, loss in enumerate(("kld", "tvd")):
            settings = TrainingSettings(
                steps=steps, batch=batch, length=length, warmup=15, final_rate=0.1, checkpoint_every=steps
            )

            def point(step: int, phase=phase, drafter=drafter, held=held, curve=curve) -> None:
                if step % every == 0:
                    curve.append([(phase * steps + step) * batch * length, held.acceptance_rate(drafter)])

            trained(drafter, target, training, loss, out / f"{name} {loss}", settings, point)
        drafter.save(out / name)
        size = sum(weight.size for _, weight in tree_flatten(drafter.trainable_parameters()))
        entry = {"start": name, "trained_parameters": size, "curve": curve, "seconds": time.monotonic() - began}
        done.append(entry)
        with lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        click.echo(f"{name}: " + ", ".join(f"{positions:,} {rate:.3f}" for positions, rate in curve))
    figure = new_figure((8, 5))
    axis = figure.subplots()
    for entry in done:
        axis.plot(*zip(*entry["curve"], strict=True), marker=".", label=entry["start"])
    axis.set(xlabel="trained positions: kld, then as many with tvd", ylabel="acceptance rate on held-out answers")
    axis.legend()
    figure.savefig(out / "starts.png")
    click.echo(out / "starts.png")


@main.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("start", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=150, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--held-out", default=96, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS))
def losses(
    target_folder: str, answers: Path, start: Path, out: Path, steps: int, batch: int, length: int, held_out: int,
    seeds: int, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Train START with each loss on the same rows, with several orders of the rows."""
    target = Target(target_folder)
    training, documents = split(answers, target, out, held_out)
    frozen = load_drafter(start, target)
    held = HeldOut(target.model, documents, frozen.output_tokens)
    click.echo(f"start: {held.acceptance_rate(frozen):.4f}")
    for seed in range(seeds):
        for name in only:
            loss, share = VARIANTS[name]
            drafter = load_drafter(start, target)
            settings = TrainingSettings(
                steps=steps, batch=batch, length=length, warmup=15, final_rate=0.1, learning_rate=5e-4, seed=seed,
                checkpoint_every=steps,
            )  # fmt: skip
            change = partial(weighted_by_rejection, frozen, share) if share else unchanged
            trained(drafter, target, training, loss, out / f"{name} {seed}", settings, change=change)
            drafter.save(out / f"{name}-{seed}")
            click.echo(f"seed {seed}, {name}: {held.acceptance_rate(drafter):.4f}")


def weighted_by_rejection(frozen: Drafter, share: float, goal: Objective, teacher: CachedTeacher) -> Objective:
    """Return an objective that weighs a share of a step by the chance 1 - α that a drafted token is rejected."""

    def weighted(drafter: Drafter, batch: Batch) -> tuple[mx.array, mx.array]:
        masks = document_masks([None] * len(frozen.layers), batch.documents)
        log_q = nn.log_softmax(frozen.lm_head(frozen.model(batch.ids[:, :-1], masks)), axis=-1).flatten(0, 1)
        states = tuple(part.flatten(0, 1) for part in batch.teacher)
        p, _ = teacher.probs(batch.temperature, frozen.output_tokens)(states, log_q)
        rejection = 1 - mx.minimum(p, mx.exp(log_q)).sum(-1).reshape(batch.weights.shape)
        weights = mx.stop_gradient(batch.weights * rejection)
        weights = share * weights / weights.sum() + (1 - share) * batch.weights
        return goal(drafter, batch._replace(weights=weights))

    return weighted


@main.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--start", "layers", default=(-1,), multiple=True, help="A layer of the target. Several make a draft model."
)
@click.option("--read", "read_layers", multiple=True, type=int, help="Layers whose inputs the head reads.")
@click.option("--steps", default=150, show_default=True, help="Steps of kld.")
@click.option("--more-steps", default=0, show_default=True, help="Steps of tvd++ after those.")
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--draft-steps", default=DRAFT_STEPS, show_default=True)
@click.option("--held-out", default=96, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True, help="Of kld. Half of it for tvd++.")
def heads(
    target_folder: str, answers: Path, out: Path, layers: tuple[int, ...], read_layers: tuple[int, ...], steps: int,
    more_steps: int, batch: int, length: int, vocabulary: int, draft_steps: int, held_out: int, learning_rate: float,
) -> None:  # fmt: skip
    """Train an EAGLE head, or a draft model of several layers: acceptance rate of each draft step on held-out answers.

    The target's probabilities and hidden states are stored in OUT.
    """
    target = Target(target_folder)
    training, documents = split(answers, target, out, held_out)
    head: WarmStart | EagleStart = EagleStart("eagle", layers[0], read_layers, vocabulary)
    if len(layers) > 1:
        head = WarmStart(layers, vocabulary_size=vocabulary, share_embedding=True)
    name = " ".join(map(str, [*layers, "reads", *read_layers] if read_layers else layers))
    drafter, coverage = stages.start_drafter(target, head, training, out / name / "start")
    click.echo(f"vocabulary: {coverage:.4f} of the answers' tokens")
    click.echo(f"before: {held_out_rates(drafter, target, documents, draft_steps)}")
    for loss, count, rate in (("kld", steps, learning_rate), ("tvd++", more_steps, learning_rate / 2)):
        if not count:
            continue
        settings = TrainingSettings(
            steps=count, batch=batch, length=length, warmup=15, final_rate=0.1, learning_rate=rate, checkpoint_every=100
        )
        drafter, _ = stages.train(
            target, drafter, [(training, 1.0)], Loss(loss), settings, out / name / loss, None, TOP_K, draft_steps
        )
        click.echo(f"{count} steps of {loss}: {held_out_rates(drafter, target, documents, draft_steps)}")


def held_out_rates(
    drafter: AnyDrafter, target: Target, documents: list[tuple[np.ndarray, np.ndarray]], draft_steps: int
) -> list[float]:
    """Return the acceptance rate of each draft step, the mean over the tokens of answers. A draft model has one."""
    if not isinstance(drafter, Eagle):
        return [round(HeldOut(target.model, documents, drafter.output_tokens).acceptance_rate(drafter), 4)]
    teacher = OnlineTeacher(target.model, True, layers_read(drafter, target.model))
    goal = eagle_objective(Loss("tvd"), teacher, draft_steps)
    total, counts = mx.zeros(draft_steps), np.zeros(draft_steps)
    for ids, mask in documents:
        weights, one = mx.array(mask[None, 1:].astype(np.float32)), mx.zeros((1, len(ids) - 1), mx.int32)
        batch = Batch(mx.array(ids)[None], one, weights, (), mx.array(1.0), mx.random.key(0))
        total = total + weighted_sums(batch, goal(drafter, batch)[1])[1:]
        counts += [mask[2 + step :].sum() for step in range(draft_steps)]  # step j skips the first predictions
    return [round(rate, 4) for rate in (np.array(total) / counts).tolist()]


@main.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("drafter_folder", metavar="DRAFTER", type=click.Path(path_type=Path))
@click.option("--rounds", default=7, show_default=True)
@click.option("--held-out", default=96, show_default=True)
@click.option("--vocabulary", "sizes", multiple=True, type=int, default=[49152, 16384, 8192, 4096, 2048])
def costs(
    target_folder: str, answers: Path, drafter_folder: Path, rounds: int, held_out: int, sizes: tuple[int, ...]
) -> None:
    """Time a step of drafters with each vocabulary, and score DRAFTER with fewer columns and fewer bits."""
    target = Target(target_folder)
    documents = list(TokenShards(answers / "tokens").documents())[-held_out::3]
    drafter = load_drafter(drafter_folder, target)
    counts = token_counts(TokenShards(answers / "tokens"), target.vocab_size)
    engines = {("target", 1): stepper(target.model, 1), ("target", 4): stepper(target.model, 4)}
    for size in sizes:
        start = WarmStart((0, -1), vocabulary_size=size, share_embedding=True)
        copy, _ = warm_start(target, start, TokenShards(answers / "tokens"))
        engines["drafter", size] = stepper(copy, 1)
    times = by_engine(interleaved(engines, rounds))
    rows = ratio(times["target", 4], times["target", 1])
    click.echo(f"target, 4 rows / 1 row: {rows}")
    held = HeldOut(target.model, documents, drafter.output_tokens)
    output_tokens = np.array(drafter.output_tokens)
    order = np.argsort(-counts[output_tokens], kind="stable")
    for size in sizes:
        cost = ratio(times["drafter", size], times["target", 1])
        coverage = np.sort(counts)[::-1][:size].sum() / counts.sum()
        line = f"{size} tokens: step / target step {cost}, coverage {coverage:.4f}"
        if size <= len(output_tokens):
            columns = mx.array(np.sort(order[:size]))
            alpha = held.acceptance_rate(drafter, columns)
            tau = (1 - alpha**4) / (1 - alpha)
            line += f", α {alpha:.3f}, τ at γ = 3 if α is the same at all positions {tau:.2f}"
            line += f", predicted speed / plain {tau / (rows.median + 3 * cost.median):.2f}"
        click.echo(line)
    for bits in ("8", "4"):
        copy = load_drafter(drafter_folder, target)
        copy.update(tree_map(lambda w, bits=bits: rounded(w, bits) if w.ndim == 2 else w, copy.trainable_parameters()))
        click.echo(f"{bits} bits: α {held.acceptance_rate(copy):.3f}")


def stepper(model: nn.Module, rows: int) -> Callable[[int], float]:
    """Return an engine that takes the mean time of steps over ``rows`` tokens after 128 tokens of context."""

    def run(seed: int, steps: int = 6) -> float:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.zeros((1, 128), mx.int32), cache))
        began = time.perf_counter()
        for _ in range(steps):
            mx.eval(mx.softmax(model(mx.zeros((1, rows), mx.int32), cache), axis=-1))
        return (time.perf_counter() - began) / steps

    return run


@main.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("drafters", nargs=-1, type=click.Path(path_type=Path))
@click.option("--prompts", "files", multiple=True, type=click.Path(path_type=Path))
@click.option("--count", default=16, show_default=True, help="Prompts of each task.")
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--draft-length", "draft_lengths", multiple=True, default=[3], show_default=True)
def tasks(
    target_folder: str, drafters: tuple[Path, ...], files: tuple[Path, ...], count: int, max_tokens: int,
    draft_lengths: tuple[int, ...],
) -> None:  # fmt: skip
    """Block efficiency at T = 0 and 1 for each file of prompts, or each category of a Spec-Bench file.

    The target answers the prompts once. ``expected_blocks`` tells how many blocks each drafter needs for an answer.
    """
    target = Target(target_folder)
    found = prompts_by_task(files, target, count)
    ends = set(target.tokenizer.eos_token_ids)
    models = {str(folder): decoding_model(folder, target) for folder in drafters}
    for temperature in (0, 1):
        mx.random.seed(0)
        sampler = mx.random.categorical if temperature else partial(mx.argmax, axis=-1)
        for task, prompts in found.items():
            tokens, blocks = 0, {name: dict.fromkeys(draft_lengths, 0.0) for name in models}
            answers = sample_answers(target.model, prompts, ends, sampler, max_tokens)
            for prompt, answer in zip(prompts, answers, strict=True):
                p = target.model(mx.array([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
                tokens += len(answer)
                for name, drafter in models.items():
                    drafts = draft_logits(drafter, target.model, prompt, answer, max(draft_lengths))
                    accepted = [acceptance_of(p, q, mx.array(answer), temperature) for q in drafts]
                    for length in draft_lengths:
                        blocks[name][length] += expected_blocks(accepted[:length])
            efficiency = {name: {n: round(tokens / count, 3) for n, count in blocks[name].items()} for name in models}
            line = {"temperature": temperature, "task": task, "prompts": len(prompts), "tokens": tokens}
            click.echo(json.dumps({**line, "block_efficiency": efficiency}))


def prompts_by_task(files: tuple[Path, ...], target: Target, count: int) -> dict[str, list[list[int]]]:
    """Return the token ids of the first prompts of each file, or of each category of a Spec-Bench file."""
    found = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        for category in dict.fromkeys(json.loads(line).get("category", file.stem) for line in lines):
            chosen = [line for line in lines if json.loads(line).get("category", file.stem) == category]
            with tempfile.TemporaryDirectory() as scratch:
                part = Path(scratch) / "prompts.jsonl"
                part.write_text("\n".join(islice(chosen, count)), encoding="utf-8")
                found[category] = read_prompts([str(part)], target.tokenizer, None)[0]
    return found


def decoding_model(folder: Path, target: Target) -> nn.Module:
    """Load a drafter, quantized or not, as float32."""
    model, _ = read_lazily(folder, target.embedding if read_config(folder).get("shared_embedding") else None)
    model.set_dtype(mx.float32)
    return dequantized(model)


def draft_logits(
    drafter: nn.Module, target: nn.Module, prompt: list[int], answer: list[int], length: int
) -> list[mx.array]:
    """Return the drafter's logits [N, V] at each token of an answer, as the first to the last token of a draft."""
    if not isinstance(drafter, Eagle):
        return [drafter(mx.array([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]] * length
    if len(prompt) < 2:
        raise click.UsageError("an EAGLE head drafts after two tokens; use longer prompts")
    parts, text = fitting_parts(drafter, target), mx.array([[*prompt, *answer[:-1]]])
    _, states = run_with_states(target, drafter.layers_read(len(target.layers)), lambda: target(text))
    # Row t reads the target's hidden states at token t and the embedding of token t + 1, and predicts token t + 2.
    features, rows = drafter.features(states)[:, :-1], DraftRows(mx.zeros((1, text.size - 1), mx.int32))
    found = []
    for _ in range(length):
        features = drafter(parts.embedding(text[:, 1:]), features, rows, rows.mask())
        found.append(drafter.logits(features, parts.head)[0, -len(answer) :])
        features = mx.concatenate([features[:, :1], features[:, :-1]], axis=1)
    return found


def acceptance_of(p: mx.array, q: mx.array, answer: mx.array, temperature: float) -> list[float]:
    """Return the probability that each token of an answer is accepted, given that it is emitted.

    With the rule "token", it is min(p, q) / p at the token. At temperature 0, it is whether the drafter's best token is
    the same.

    Args:
        p: The target's logits at the tokens, [N, V].
        q: The drafter's.
        answer: The tokens [N].
        temperature: 0 or 1.
    """
    if temperature == 0:
        return (q.argmax(-1) == answer).astype(mx.float32).tolist()
    ratio = mx.take_along_axis(mx.softmax(q, -1), answer[:, None], -1) / mx.take_along_axis(
        mx.softmax(p, -1), answer[:, None], -1
    )
    return mx.minimum(1, ratio)[:, 0].tolist()


def expected_blocks(accepted: list[list[float]]) -> float:
    """Return the expected number of blocks for an answer.

    Args:
        accepted: Probability that each token of the answer is accepted, as the first to the last token of a draft:
            [draft length, N].
    """
    draft_length, count = len(accepted), len(accepted[0])
    blocks = [0.0] * (count + 1)  # from each token on
    for start in reversed(range(count)):
        blocks[start], reached = 1.0, 1.0
        for length in range(draft_length + 1):
            place = start + length
            ends = 1 - accepted[length][place] if length < draft_length and place < count else 1.0
            blocks[start] += reached * ends * blocks[min(place + 1, count)]
            reached *= 1 - ends
    return blocks[0]


if __name__ == "__main__":
    main()
