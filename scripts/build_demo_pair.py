"""Make the embedded demo pair (mlxspec/demo/) with mlxspec's own commands.

    python scripts/build_demo_pair.py --teacher STORIES260K_FOLDER --stories TINYSTORIES.jsonl --work WORK_FOLDER

1. ``mlxspec train distill``   stories by the public stories260K model (MIT)                     teacher/
2. a byte-level BPE of our own over them and over real stories                                   tokenizer/
3. ``mlxspec train run``       demo_target.toml: next-token training on both, then 4 bits        target/
4. ``mlxspec train run``       demo_drafter.toml: distilled from the 4-bit target's own stories  demo_drafter/

Finished steps in WORK_FOLDER are skipped, interrupted ones resumed. The result is copied to mlxspec/demo/ (or --out).
On Linux preload OpenBLAS (see MEASUREMENTS.md).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
from mlx_lm.utils import load_model, load_tokenizer, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlxspec.models.drafter import Drafter
from mlxspec.models.quantizing import quantized
from mlxspec.training.shards import TokenShards

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE, CONTEXT = 2048, 1024
SCRIPTS = Path(__file__).parent
DEMO = SCRIPTS.parent / "mlxspec" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def mlxspec(*arguments: object) -> None:
    subprocess.run([Path(sys.executable).with_name("mlxspec"), *map(str, arguments)], check=True)


def sample_stories(teacher: Path, work: Path, count: int) -> None:
    """Stories of the teacher, those that came to an end, as text."""
    temperatures = [option for value in (0.5, 0.6, 0.7, 0.8) for option in ("--temperatures", value)]
    mlxspec("train", "distill", "--target", teacher, "--samples", count, *temperatures, "--top-p", 1,
            "--max-tokens", 384, "--group", 128, "--out", work / "teacher")  # fmt: skip
    out, tokenizer = work / "sampled" / "stories.jsonl", load_tokenizer(teacher)
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        ended = (ids for ids, _ in TokenShards(work / "teacher" / "tokens").documents() if ids[-1] == ids[0])
        texts = (tokenizer.decode(ids[1:-1].tolist()).strip() for ids in ended)  # it ends a story with its BOS
        aside = out.with_suffix(".part")
        aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
        aside.rename(out)


def read_stories(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open()]


def make_tokenizer(stories: list[str], folder: Path) -> None:
    """A folder that says which tokens there are: all that training needs to know of a target."""
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
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    write_json(folder / "tokenizer_config.json", settings)
    config = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": CONTEXT}
    write_json(folder / "config.json", {**config, "bos_token_id": 0, "eos_token_id": 1})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def run_recipe(name: str, work: Path, scale: float) -> Path:
    """Run a recipe of this folder in ``work`` and return its last drafter. ``scale`` shortens it, for a trial."""
    recipe = (SCRIPTS / name).read_text()
    for key in ("steps", "samples", "evaluate_every", "max_tokens"):
        recipe = scaled(recipe, key, scale)
    (work / name).write_text(recipe)
    mlxspec("train", "run", work / name)
    stages = sorted((work / name).with_suffix("").glob("*/drafter"))
    return max(stages, key=lambda path: path.stat().st_mtime)


def scaled(recipe: str, key: str, scale: float) -> str:
    lines = recipe.split("\n")
    for number, line in enumerate(lines):
        if line.startswith(f"{key} = "):
            lines[number] = f"{key} = {max(2, round(int(line.split(' = ')[1]) * scale))}"
    return "\n".join(lines)


def quantize_target(trained: Path, folder: Path) -> None:
    """Write the trained model in 16 bits, its matrices in 4."""
    model, config = load_model(trained)
    model.set_dtype(mx.float16)
    model, config = quantized(model, config, "4")
    save_model(folder, model)
    for name in TOKENIZER_FILES:
        shutil.copyfile(trained / name, folder / name)
    save_config(config, folder / "config.json")  # last: it says that the folder is complete


def save_drafter(trained: Path, folder: Path) -> None:
    """Write the drafter in 16 bits, without the checkpoints and the record of the training."""
    drafter = Drafter.load(trained, mx.float16)
    drafter.save(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(trained / name, folder / name)


@click.command()
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--stories", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=DEMO, show_default=True)
@click.option("--samples", default=14000, show_default=True, help="Stories to draw from the teacher.")
@click.option("--scale", default=1.0, show_default=True, help="Of all steps and samples of the recipes.")
def main(teacher, stories, work, out, samples, scale):
    work.mkdir(parents=True, exist_ok=True)
    sample_stories(teacher, work, samples)
    # Each real story once, among many sampled ones: a target that sees them more often learns them by heart.
    (work / "stories").mkdir(exist_ok=True)
    shutil.copyfile(stories, work / "stories" / "0.jsonl")
    if not (work / "tokenizer" / "config.json").exists():
        real, sampled = read_stories(work / "stories" / "0.jsonl"), read_stories(work / "sampled" / "stories.jsonl")
        make_tokenizer(real * 20 + sampled, work / "tokenizer")
    trained = run_recipe("demo_target.toml", work, scale)
    if not (work / "target" / "config.json").exists():
        quantize_target(trained, work / "target")
    save_drafter(run_recipe("demo_drafter.toml", work, scale), work / "drafter")
    for name in ("target", "drafter"):
        shutil.copytree(work / name, out / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
