"""The three stages, each a function from a target and settings to a folder.

A stage's folder has ``stage.json``: what went into it, as settings and fingerprints, and whether it is complete. Run
again with the same inputs, a complete stage is skipped and an unfinished one goes on; with other inputs it refuses.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.models.drafter import Drafter, DrafterConfig
from mlxspec.models.loading import TOKENIZER_FILES, read_config, read_model, read_tokenizer, resolved
from mlxspec.models.memory import declared_context
from mlxspec.models.quantizing import COPIED, dequantized
from mlxspec.settings import option
from mlxspec.training.corpus import BadLines, read_prompts, tokenize_corpus
from mlxspec.training.files import write_json
from mlxspec.training.losses import Loss
from mlxspec.training.mixture import Mixture
from mlxspec.training.objectives import objective
from mlxspec.training.processes import is_first
from mlxspec.training.record import begin, complete
from mlxspec.training.responses import AnswerSettings, answer_all, check_prompts, groups, groups_from_nothing
from mlxspec.training.shards import Index, TokenShards
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Evaluate, Metrics, Trainer, TrainingSettings

UNIMPORTANT = ("checkpoint_every", "log_every")  # settings that change nothing about the result
SAMPLED = 2**20  # bytes at both ends of a file of weights that its fingerprint looks at


@dataclass(frozen=True)
class DrafterShape:
    """A new drafter's shape; the vocabulary is the target's. The defaults are the 115M preset of arXiv 2403.00858."""

    hidden_size: int = option(1024, "Width.")
    intermediate_size: int = option(2816, "Width inside the MLP.")
    num_hidden_layers: int = option(4, "Layers.")
    num_attention_heads: int = option(8, "Heads.")
    num_key_value_heads: int | None = option(None, "Heads of keys and values; as many as heads if not given.")
    tie_word_embeddings: bool = option(False, "One table for input and output.")


@dataclass
class Listener:
    """Whom the stages tell how they get on."""

    stage: Callable[[str, str], None] = lambda name, what: None
    work: Callable[[int, int, int], None] = lambda done, total, tokens: None  # of making shards
    step: Callable[[int, int, Metrics], None] = lambda steps, step, metrics: None
    bad_lines: Callable[[BadLines], None] = lambda bad: None


@dataclass
class Target:
    """The model that a drafter is made for; nothing is read before it is needed."""

    name: str
    listener: Listener = field(default_factory=Listener)

    @cached_property
    def folder(self) -> Path:
        return resolved(self.name)

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder, self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @property
    def vocab_size(self) -> int:
        """Of its logits; an old config does not say, the tokenizer then does."""
        size = self.config.get("vocab_size", -1)
        return size if size > 0 else len(self.tokenizer.get_vocab())

    @property
    def context(self) -> int | None:
        return declared_context(self.config)

    @cached_property
    def model(self) -> nn.Module:
        model = read_model(self.folder)
        return dequantized(model) if mx.default_device().type == mx.cpu else model

    @cached_property
    def tokens(self) -> str:
        """Fingerprint of the tokenizer: which text each id is."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and the config, wherever the folder is."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.npz")]):
            digest.update(file_sample(file))
        return digest.hexdigest()[:16]

    def new_drafter(self, shape: DrafterShape, seed: int) -> Drafter:
        bos, eos = self.tokenizer.bos_token_id, min(self.tokenizer.eos_token_ids, default=None)
        context = self.context or 2048
        mx.random.seed(seed)
        return Drafter(
            DrafterConfig(
                self.vocab_size, **asdict(shape), max_position_embeddings=context, bos_token_id=bos, eos_token_id=eos
            )
        )


def file_sample(file: Path) -> bytes:
    with file.open("rb") as content:
        head = content.read(SAMPLED)
        content.seek(max(0, file.stat().st_size - SAMPLED))
        return f"{file.stat().st_size}".encode() + head + content.read()


def pretraining_shards(target: Target, data: Sequence[str], folder: Path) -> TokenShards:
    """Text files in tokens, made once."""
    inputs = {"data": list(data), "tokenizer": target.tokens}
    if begin(folder, inputs):
        target.listener.stage(folder.name, "tokenising")
        if is_first():
            shutil.rmtree(folder / "tokens", ignore_errors=True)  # quick to make again, so half of it is not kept
            _, bad = tokenize_corpus(
                data, target.tokenizer, target.vocab_size, target.tokens, folder / "tokens", target.listener.work
            )
            target.listener.bad_lines(bad)
        complete(folder)
    return TokenShards(folder / "tokens", verify=True)


def distill(
    target: Target,
    prompts: Sequence[str],
    system: str | None,
    settings: AnswerSettings,
    folder: Path,
    held_out: int = 0,
) -> TokenShards:
    """The target's answers to prompts, all but the last ``held_out``; without prompts, its texts from BOS."""
    inputs = {
        "prompts": list(prompts),
        "system": system,
        "held_out": held_out,
        "target": target.fingerprint,
        "tokenizer": target.tokens,
        **asdict(settings),
    }
    if begin(folder, inputs):
        target.listener.stage(folder.name, "the target answers")
        if prompts:
            read, bad = read_prompts(prompts, target.tokenizer, system)
            target.listener.bad_lines(bad)
            work = groups(check_prompts(read[: len(read) - held_out], settings, target.context), settings)
        else:
            work = groups_from_nothing(target.tokenizer.bos_token_id, settings)
        answer_all(
            target.model,
            target.tokenizer,
            target.vocab_size,
            target.tokens,
            work,
            settings,
            folder / "tokens",
            target.listener.work,
        )
        complete(folder)
    return TokenShards(folder / "tokens", verify=True)


def train(
    target: Target,
    drafter: Drafter,
    sources: Sequence[tuple[TokenShards, float]],
    loss: Loss,
    settings: TrainingSettings,
    folder: Path,
    evaluate: Evaluate | None = None,
) -> tuple[Drafter, Metrics]:
    """Train ``drafter`` on a mixture of shards (each with its share) and leave it in ``folder/drafter``.

    Raises TrainingError if shards, drafter and target do not have the same tokens.
    """
    for shards, _ in sources:
        check_tokens(shards.index, target, shards.folder)
    if drafter.config.vocab_size > target.vocab_size:
        raise TrainingError(
            f"the drafter has a vocabulary of {drafter.config.vocab_size} and {target.name} one of {target.vocab_size}"
            "; start from a drafter made for this target"
        )
    inputs = {
        "drafter": weights_fingerprint(drafter),
        "shards": [[shards.fingerprint, share] for shards, share in sources],
        "tokenizer": target.tokens,
        "target": target.fingerprint if loss.needs_target else None,
        **asdict(loss),
        **{name: value for name, value in asdict(settings).items() if name not in UNIMPORTANT},
    }
    out = folder / "drafter"
    if not begin(folder, inputs):
        trained = Drafter.load(out)
        return trained, json.loads((folder / "stage.json").read_text())["result"]
    target.listener.stage(
        folder.name, f"{settings.steps} steps of {settings.batch * settings.length} positions, {loss.name}"
    )
    batches = Mixture(
        [s for s, _ in sources], [share for _, share in sources], settings.length, settings.batch, settings.seed
    )
    teacher = OnlineTeacher(target.model) if loss.needs_target else None
    trainer = Trainer(
        drafter,
        objective(loss, teacher),
        batches,
        settings,
        folder,
        evaluate,
        report=partial(target.listener.step, settings.steps),
    )
    result = trainer.run()
    if is_first():
        drafter.save(out)
        copy_tokenizer(target.folder, out)
        write_json(out / "training.json", {"inputs": inputs, "result": result})
    complete(folder, result)
    return drafter, result


def check_tokens(index: Index, target: Target, folder: Path) -> None:
    if index.tokenizer != target.tokens or index.vocab_size != target.vocab_size:
        raise TrainingError(
            f"{folder} was made with another tokenizer (vocabulary of {index.vocab_size}) than {target.name}'s "
            f"({target.vocab_size}); make the shards again with this target"
        )


def weights_fingerprint(drafter: Drafter) -> str:
    digest = hashlib.sha256(repr(drafter.config).encode())
    for _, weight in sorted(tree_flatten(drafter.parameters())):
        digest.update(bytes(memoryview(weight.astype(mx.float32))))
    return digest.hexdigest()[:16]


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*COPIED, *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def start_from(name: str | Path, target: Target) -> Drafter:
    """A drafter to go on with. Raises ModelLoadError or InvalidRequestError if it is none."""
    folder = resolved(name)
    if "quantization" in read_config(folder):
        raise InvalidRequestError(f"{folder} is quantised and cannot be trained; start from the unquantised drafter")
    return Drafter.load(folder, mx.float32)
