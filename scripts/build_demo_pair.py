"""Make the embedded demo pair (mlxspec/demo/) from nothing: a 4-bit story model and a drafter for it.

    python scripts/build_demo_pair.py --teacher STORIES260K_FOLDER --stories TINYSTORIES.jsonl --work WORK_FOLDER

Stages, each skipped when its file is already in WORK_FOLDER:

1. sample     stories from the public stories260K model (MIT)                       samples-*.jsonl
2. tokenizer  a byte-level BPE of our own over samples and stories                  tokenizer.json
3. target     next-token training on both, then 4 bits, group 64                    target/
4. drafter    trained on the same text against the 4-bit target's distribution      drafter/

The result is copied to mlxspec/demo/ (or --out) at the end. On Linux preload OpenBLAS (see CONTRIBUTING.md).
"""

import json
import math
import multiprocessing
import shutil
from functools import partial
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlxspec.models.drafter import Drafter, DrafterConfig

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 2048
LENGTH = 192  # positions in a training row
DEMO = Path(__file__).parent.parent / "mlxspec" / "demo"

TARGET = DrafterConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)
DRAFTER = DrafterConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=3,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)


def sample_stories(teacher: Path, seed: int, tokens: int, out: Path) -> None:
    """Sample streams of stories from the teacher at temperatures 0.5 to 0.8 until ``tokens`` are drawn."""
    model, _ = load_model(teacher)
    tokenizer = load_tokenizer(teacher)
    separator = tokenizer.bos_token_id  # stories260K begins and ends a story with the same token
    rows, context = 128, 384
    mx.random.seed(seed)
    temperature = mx.linspace(0.5, 0.8, rows)[:, None]
    aside = out.with_suffix(".part")
    with aside.open("w") as file:
        for _ in range(math.ceil(tokens / (rows * context))):
            cache = [KVCache() for _ in model.layers]
            token, drawn = mx.full((rows, 1), separator), []
            for _ in range(context):
                logits = model(token, cache=cache)[:, -1]
                token = mx.random.categorical(logits / temperature)[:, None]
                mx.async_eval(token)
                drawn.append(token)
            for row in mx.concatenate(drawn, axis=1).tolist():
                if separator in row:  # only stories that came to an end
                    story = tokenizer.decode(row[: row.index(separator)]).strip()
                    file.write(json.dumps({"text": story}) + "\n")
    aside.rename(out)


def read_stories(paths: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in path.open()]


def train_tokenizer(stories: list[str], out: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(out))
    return tokenizer


def pack(tokenizer: Tokenizer, stories: list[str], seed: int) -> np.ndarray:
    """Stories in random order as one stream of ids, cut into rows: [rows, LENGTH + 1]."""
    order = np.random.default_rng(seed).permutation(len(stories))
    eos = tokenizer.token_to_id(EOS)
    stream = [
        token for encoding in tokenizer.encode_batch([stories[i] for i in order]) for token in (*encoding.ids, eos)
    ]
    rows = len(stream) // (LENGTH + 1)
    return np.array(stream[: rows * (LENGTH + 1)], dtype=np.uint16).reshape(rows, LENGTH + 1)


def next_token_loss(model: nn.Module, rows: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")


def distillation_loss(target: nn.Module, model: nn.Module, rows: mx.array) -> mx.array:
    """KL(p || q) up to p's entropy: cross-entropy against the target's own distribution."""
    target_probs = mx.stop_gradient(mx.softmax(target(rows[:, :-1]), axis=-1))
    return nn.losses.cross_entropy(model(rows[:, :-1]), target_probs, reduction="mean")


def train(model: nn.Module, loss, rows: np.ndarray, steps: int, batch: int, peak: float, seed: int) -> None:
    """AdamW: warm-up over 2 % of the steps, then a cosine down to a twentieth of ``peak``."""
    warm_up = max(1, steps // 50)
    rate = optim.join_schedules(
        [optim.linear_schedule(0, peak, warm_up), optim.cosine_decay(peak, steps - warm_up, peak / 20)], [warm_up]
    )
    optimizer = optim.AdamW(learning_rate=rate, betas=[0.9, 0.98], weight_decay=0.05)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch_rows: mx.array) -> mx.array:
        value, gradient = nn.value_and_grad(model, loss)(model, batch_rows)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        return value

    random, average, order = np.random.default_rng(seed), None, []
    for number in range(1, steps + 1):
        if len(order) < batch:
            order = random.permutation(len(rows))
        chosen, order = order[:batch], order[batch:]
        value = step(mx.array(rows[chosen].astype(np.int32)))
        mx.eval(value, state)
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        if number % 20 == 0:
            click.echo(f"step {number} of {steps}, {batch * LENGTH} positions each, loss {average:.3f}", err=True)


def save(model: Drafter, folder: Path, tokenizer: Path, quantization: dict | None) -> None:
    """The Hugging Face Llama layout in 16 bits (or quantised), with the tokenizer beside it."""
    model.set_dtype(mx.float16)
    model.save(folder)
    if quantization:
        config = {**model.config.to_dict(), "quantization": quantization}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(tokenizer, folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.set_dtype(mx.float32)


@click.command()
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--stories", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=DEMO, show_default=True)
@click.option("--sample-tokens", default=4_000_000, help="Tokens to draw from the teacher, for each of two workers.")
@click.option("--target-steps", default=1400)
@click.option("--drafter-steps", default=800)
@click.option("--batch", default=16, help="Rows of 192 positions in a step.")
def main(teacher, stories, work, out, sample_tokens, target_steps, drafter_steps, batch):
    work.mkdir(parents=True, exist_ok=True)
    samples = [work / f"samples-{seed}.jsonl" for seed in (1, 2)]
    todo = [(teacher, seed, sample_tokens, file) for seed, file in enumerate(samples, 1) if not file.exists()]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(sample_stories, todo)

    real, sampled = read_stories([stories]), read_stories(samples)
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(real * 20 + sampled, tokenizer_file)
    # The real stories are the better text and there are few of them: each is seen several times an epoch.
    rows = pack(Tokenizer.from_file(str(tokenizer_file)), real * 4 + sampled, seed=0)
    click.echo(f"{len(sampled)} sampled stories, {rows.size} tokens", err=True)

    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    if not (work / "target" / "config.json").exists():
        mx.random.seed(0)
        target = Drafter(TARGET)
        train(target, next_token_loss, rows, target_steps, batch, peak=2e-3, seed=0)
        click.echo(f"loss {evaluate(target, rows):.3f} in float32", err=True)
        nn.quantize(target, **quantization)
        click.echo(f"loss {evaluate(target, rows):.3f} in 4 bits", err=True)
        save(target, work / "target", tokenizer_file, quantization)

    target, _ = load_model(work / "target")
    # Dequantised: the same distribution, and on a CPU many times faster over a batch of rows.
    dequantized = dequantize(target)
    if not (work / "drafter" / "config.json").exists():
        mx.random.seed(1)
        drafter = Drafter(DRAFTER)
        train(drafter, partial(distillation_loss, dequantized), rows, drafter_steps, batch, peak=4e-3, seed=1)
        save(drafter, work / "drafter", tokenizer_file, quantization=None)

    for name in ("target", "drafter"):
        shutil.copytree(work / name, out / name, dirs_exist_ok=True)


def evaluate(model: nn.Module, rows: np.ndarray) -> float:
    return next_token_loss(model, mx.array(rows[:8].astype(np.int32))).item()


def dequantize(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    mx.eval(model.parameters())
    return model


if __name__ == "__main__":
    main()
