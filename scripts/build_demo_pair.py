"""Train the built-in demo pair (mlxspec/demo/) further with mlxspec's own commands.

    python scripts/build_demo_pair.py --start PAIR_FOLDER --stories TINYSTORIES.jsonl --work WORK_FOLDER

1. real stories, and copies of them with other names           stories/
2. ``mlxspec train run``   demo_target.toml: next-token training of the pair's target on them, then 4 bits      target/
3. ``mlxspec train run``   demo_drafter.toml: distillation of the pair's drafter from the 4-bit target          drafter/

PAIR_FOLDER holds an earlier demo pair, in target/ and drafter/. Finished steps in WORK_FOLDER are skipped, interrupted
ones resumed. The result is copied to mlxspec/demo/ (or --out). On Linux, install OpenBLAS first.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
from mlx_lm.utils import load_model, save_config, save_model

from mlxspec.models.drafter import Drafter
from mlxspec.models.quantizing import dequantized, quantized

SCRIPTS = Path(__file__).parent
DEMO = SCRIPTS.parent / "mlxspec" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
COPIES = 3  # of each story, with other names
# The names that are most common in TinyStories.
GIRLS = ["Lily", "Anna", "Mia", "Lucy", "Molly", "Sara", "Sarah", "Jane", "Daisy", "Jill", "Sally", "Lila", "Sue",
         "Amy", "Mary", "Elly", "Emma", "Jenny", "Grace", "Ella", "Emily", "Kate", "Sophie"]  # fmt: skip
BOYS = ["Ben", "Timmy", "Tom", "Jack", "Tim", "Sam", "Max", "John", "Bob", "Joe", "Benny", "Jimmy", "Billy", "Andy",
        "Tommy", "Frank", "James", "Jake", "Leo", "Jim", "Danny", "Peter", "Charlie"]  # fmt: skip


def mlxspec(*arguments: object) -> None:
    subprocess.run([Path(sys.executable).with_name("mlxspec"), *map(str, arguments)], check=True)


def write_stories(source: Path, out: Path) -> None:
    """Write the stories of ``source``, and copies of them with other names.

    The copies teach the target to keep to the names of a story. They also keep it from learning the stories by heart.
    """
    real = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
    real = [text for text in real if text.isascii()]  # the others have broken quotation marks
    rng = random.Random(0)
    texts = real + [renamed(text, rng) for _ in range(COPIES) for text in real]
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def renamed(story: str, rng: random.Random) -> str:
    new: dict[str, str] = {}
    for names in (GIRLS, BOYS):
        old = [name for name in names if re.search(rf"\b{name}\b", story)]
        new.update(zip(old, rng.sample(names, len(old)), strict=True))
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: new.get(match[0], match[0]), story)


def dequantize_target(stored: Path, folder: Path) -> None:
    """Write the weights that training starts from, in float32."""
    model, config = load_model(stored)
    model = dequantized(model)
    model.set_dtype(mx.float32)
    write_model(model, {key: value for key, value in config.items() if "quantization" not in key}, stored, folder)


def quantize_target(trained: Path, folder: Path) -> None:
    """Write the trained model in 16 bits, its matrices in 4."""
    model, config = load_model(trained)
    model.set_dtype(mx.float16)
    write_model(*quantized(model, config, "4"), trained, folder)


def write_model(model, config: dict, source: Path, folder: Path) -> None:
    save_model(folder, model)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
    save_config(config, folder / "config.json")  # last: it says that the folder is complete


def save_drafter(trained: Path, folder: Path) -> None:
    """Write the drafter in 16 bits, without the checkpoints and the record of the training."""
    drafter = Drafter.load(trained, mx.float16)
    drafter.save(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(trained / name, folder / name)


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


@click.command()
@click.option("--start", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--stories", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=DEMO, show_default=True)
@click.option("--scale", default=1.0, show_default=True, help="Of all steps and samples of the recipes.")
def main(start, stories, work, out, scale):
    work.mkdir(parents=True, exist_ok=True)
    write_stories(stories, work / "stories" / "0.jsonl")
    if not (work / "start" / "target" / "config.json").exists():
        dequantize_target(start / "target", work / "start" / "target")
    shutil.copytree(start / "drafter", work / "start" / "drafter", dirs_exist_ok=True)
    trained = run_recipe("demo_target.toml", work, scale)
    if not (work / "target" / "config.json").exists():
        quantize_target(trained, work / "target")
    save_drafter(run_recipe("demo_drafter.toml", work, scale), work / "drafter")
    for name in ("target", "drafter"):
        shutil.copytree(work / name, out / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
