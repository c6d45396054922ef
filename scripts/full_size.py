"""Does the full size work? A Llama 2 7B with random 4-bit weights, in both layouts, with the 115M drafter or a head.

    python scripts/full_size.py --tokenizer LLAMA2_TOKENIZER.model --work WORK_FOLDER

Writes about 9 GB into WORK_FOLDER. Then a process per layout loads it, decodes a few tokens, and prints load time and
peak memory relative to the weights. A third process does so with an EAGLE-1 head, which drafts, pauses for a block and
drafts again. The text is noise; the sizes are real.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs

import mlxspec
from mlxspec.decoding.drafting import MODEL, PLAIN, Choice
from mlxspec.decoding.policy import Fixed
from mlxspec.models.eagle import EAGLE1, Eagle
from mlxspec.models.memory import weight_bytes
from mlxspec.models.old_layout import LAYER_NAMES, OUTER_NAMES
from mlxspec.models.reading import read_config

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 32, 4096, 11008, 32000
QUANTIZATION = {"group_size": 64, "bits": 4}


def random_linear(name: str, rows: int, columns: int) -> dict[str, mx.array]:
    """Return random 4-bit values with scales that keep the products in range."""
    groups = (rows, columns // QUANTIZATION["group_size"])
    packed = mx.random.randint(0, 2**31 - 1, (rows, columns // 8)).astype(mx.uint32)
    scales = mx.full(groups, 0.3 / columns**0.5, mx.float16)
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": -7.5 * scales}


def random_llama() -> dict[str, mx.array]:
    """Return arrays by their names in the Hugging Face layout. They are evaluated when they are written."""
    shapes = {
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
    }
    weights = {"model.embed_tokens.weight": mx.random.normal((VOCAB, HIDDEN)).astype(mx.float16)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights |= random_linear(f"model.layers.{layer}.{name}", *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = mx.ones(HIDDEN, mx.float16)
    weights["model.norm.weight"] = mx.ones(HIDDEN, mx.float16)
    return weights | random_linear("lm_head", VOCAB, HIDDEN)


def old_name(name: str) -> str:
    for new, old in {new: old for old, new in {**LAYER_NAMES, **OUTER_NAMES}.items()}.items():
        name = name.replace(f"{new}.", f"{old}.")
    return name.removeprefix("model.")


def write_models(work: Path, tokenizer: Path) -> dict[str, Path]:
    folders = {name: work / name for name in ("hf", "old", "drafter", "head")}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if name != "head":
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
    if not (folders["hf"] / "config.json").exists():
        mx.save_safetensors(str(folders["hf"] / "model.safetensors"), random_llama())
        write_config(folders["hf"], model_type="llama", hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
                     num_hidden_layers=LAYERS, num_attention_heads=32, rms_norm_eps=1e-5, vocab_size=VOCAB,
                     max_position_embeddings=4096, tie_word_embeddings=False)  # fmt: skip
    if not (folders["old"] / "config.json").exists():
        weights = mx.load(str(folders["hf"] / "model.safetensors"))
        mx.savez(str(folders["old"] / "weights.npz"), **{old_name(name): array for name, array in weights.items()})
        write_config(folders["old"], dim=HIDDEN, n_layers=LAYERS, n_heads=32, norm_eps=1e-5, vocab_size=-1)
    if not (folders["drafter"] / "config.json").exists():
        drafter = mlxspec.Drafter(mlxspec.DrafterConfig.llama2_chat_115m())
        drafter.set_dtype(mx.float16)
        drafter.save(folders["drafter"])
    if not (folders["head"] / "config.json").exists():
        head = random_head()
        head.save(folders["head"])
        weights = mx.load(str(folders["head"] / "model.safetensors"))
        table = mx.zeros((VOCAB, HIDDEN), mx.float16)  # published heads contain the target's
        mx.save_safetensors(str(folders["head"] / "model.safetensors"), {**weights, "embed_tokens.weight": table})
    return folders


def random_head() -> Eagle:
    head = Eagle(ModelArgs("llama", HIDDEN, 1, INTERMEDIATE, 32, 1e-5, VOCAB, max_position_embeddings=4096), EAGLE1)
    head.set_dtype(mx.float16)
    return head


class InTurn(Fixed):
    """Drafts two tokens in every other block."""

    def __init__(self):
        super().__init__(PLAIN)
        self.blocks = 0

    def choose(self, missing: float) -> Choice:
        return PLAIN if self.blocks % 2 else Choice(MODEL, 2)

    def expected_tokens(self, choice: Choice) -> float:
        return float("inf")  # so that no block is queued before the last one is observed

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        self.blocks += 1
        click.echo(f"{choice.proposer}: {len(tokens)} tokens")


def write_config(folder: Path, **config) -> None:
    (folder / "config.json").write_text(json.dumps({**config, "quantization": QUANTIZATION}, indent=2) + "\n")


def load_and_decode(target: Path, drafter: Path, tokens: int) -> None:
    mx.reset_peak_memory()
    start = time.perf_counter()
    pair = mlxspec.load(target, drafter)
    seconds = time.perf_counter() - start
    models = (pair.target, pair.drafter)
    weights = sum(weight.nbytes for model in models for _, weight in tree_flatten(model.parameters()))
    predicted = sum(weight_bytes(folder, read_config(folder), None) for folder in (target, drafter))
    peak_load = mx.get_peak_memory()
    decoder = mlxspec.SpeculativeDecoder(pair, policy=InTurn() if isinstance(pair.drafter, Eagle) else None)
    for _ in decoder.stream("Once upon a time", max_tokens=tokens):
        pass
    stats = decoder.stats
    peak = stats.peak_memory_bytes
    click.echo(
        f"{target.name}, {drafter.name}: weights {weights / 1e9:.2f} GB ({predicted / 1e9:.2f} GB predicted), loaded "
        f"in {seconds:.1f} s, peak while loading {peak_load / weights:.3f}x, while decoding {peak / weights:.3f}x; "
        f"{stats.tokens} tokens, {stats.tokens_per_second:.2f} tokens/s, block efficiency {stats.block_efficiency:.2f}"
    )
    if max(peak_load, peak) > 1.15 * weights:
        raise click.ClickException("peak memory is more than 1.15 times the weights")


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=6, show_default=True)
@click.option("--only", type=click.Choice(["hf", "old", "head"]), help="Load this layout in this process.")
def main(tokenizer, work, tokens, only):
    if only:
        target, drafter = ("hf", "head") if only == "head" else (only, "drafter")
        load_and_decode(work / target, work / drafter, tokens)
        return
    write_models(work, tokenizer)
    for layout in ("hf", "old", "head"):
        options = ["--tokenizer", tokenizer, "--work", work, "--tokens", str(tokens), "--only", layout]
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
