"""Write the prompts that a small chat model answers for the training of its drafter, and those kept for tests.

    python scripts/one_night_prompts.py DATA_FOLDER OUT_FOLDER

DATA_FOLDER holds text/dolly_no_context.jsonl, text/gsm8k_train.jsonl and tales/*.txt. The last 100 prompts of Dolly and
of GSM8K go to dolly-test.jsonl and gsm8k-test.jsonl. No prompt for training equals one of them. The prompts for
training go to prompts.jsonl in random order. Each line names its task:

- all other prompts of Dolly, and 3000 of GSM8K,
- 3000 requests about a passage of a tale: to summarize, to translate a sentence, to answer a question, to rewrite,
- 4000 requests for a children's story.
"""

import json
import random
import re
from pathlib import Path

import click

HELD_OUT, GSM8K, PASSAGES, STORIES = 100, 3000, 3000, 4000
LANGUAGES = ("German", "French", "Spanish", "Italian")
REQUESTS = (
    ("summarization", "Summarize: {passage}"),
    ("summarization", "Summarize the following text in two sentences.\n\n{passage}"),
    ("translation", "Translate English to {language}: {sentence}"),
    ("passages", "{passage}\n\nWho is this text about, and what happens?"),
    ("passages", "Answer the question with the passage below.\n\nPassage: {passage}\n\nQuestion: What happens first?"),
    ("passages", "Rewrite this in modern English: {sentence}"),
    ("passages", "Explain to a child what this means: {sentence}"),
)
STORY = "Write a short story for a small child, in simple words. It is about a {adjective} {hero} who {event} {place}."
ADJECTIVES = ["little", "brave", "shy", "happy", "lazy", "clever", "hungry", "kind", "curious", "sleepy", "funny",
              "lonely"]  # fmt: skip
HEROES = ["girl", "boy", "cat", "dog", "rabbit", "bear", "mouse", "fox", "duck", "bird", "fish", "frog", "robot", "car",
          "tree", "pig", "horse", "owl", "dragon"]  # fmt: skip
EVENTS = ["finds a red ball", "loses a hat", "makes a new friend", "learns to share", "is afraid of the dark",
          "bakes a cake", "builds a boat", "helps an old man", "sees a rainbow", "wants to fly", "tells a lie",
          "gets lost", "plants a seed", "finds a big box", "learns to swim"]  # fmt: skip
PLACES = ["in the park", "by the sea", "in the forest", "at home", "on a farm", "in the snow", "at school",
          "in the garden", "on a hill"]  # fmt: skip


def user_prompts(path: Path) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in path.open(encoding="utf-8")]


def passage_prompts(tales: list[Path], rng: random.Random) -> list[tuple[str, str]]:
    """Return the task and the prompt of each request about a passage."""
    lines = [line.strip() for path in tales for line in path.read_text(encoding="utf-8").splitlines()]
    passages = rng.sample([line for line in lines if 300 < len(line) < 900], PASSAGES)
    prompts = []
    for number, passage in enumerate(passages):
        sentence = max(re.split(r"(?<=[.!?]) ", passage), key=len)[:300]
        task, request = REQUESTS[number % len(REQUESTS)]
        prompts.append((task, request.format(passage=passage, sentence=sentence, language=rng.choice(LANGUAGES))))
    return prompts


def story_prompts(rng: random.Random) -> list[str]:
    every = [(a, h, e, p) for a in ADJECTIVES for h in HEROES for e in EVENTS for p in PLACES]
    return [
        STORY.format(adjective=adjective, hero=hero, event=event, place=place)
        for adjective, hero, event, place in rng.sample(every, STORIES)
    ]


def write(prompts: list[tuple[str, str]], path: Path) -> None:
    lines = (json.dumps({"prompt": prompt, "task": task}) + "\n" for task, prompt in prompts)
    path.write_text("".join(lines), encoding="utf-8")


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(data: Path, out: Path) -> None:
    rng = random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    dolly, gsm8k = (user_prompts(data / "text" / f"{name}.jsonl") for name in ("dolly_no_context", "gsm8k_train"))
    tests = {"dolly": dolly[-HELD_OUT:], "gsm8k": gsm8k[-HELD_OUT:]}
    for name, prompts in tests.items():
        write([(name, prompt) for prompt in prompts], out / f"{name}-test.jsonl")
    passages = passage_prompts(sorted((data / "tales").glob("*.txt")), rng)
    held_out = {prompt for prompts in tests.values() for prompt in prompts}
    some = rng.sample(gsm8k[:-HELD_OUT], GSM8K)
    lists = {"dolly": dolly, "gsm8k": some, "stories": story_prompts(rng)}
    tasks = {prompt: task for task, prompts in lists.items() for prompt in prompts}
    tasks |= {prompt: task for task, prompt in passages}
    every = dict.fromkeys([*dolly, *some, *(prompt for _, prompt in passages), *lists["stories"]])
    training = [prompt for prompt in every if prompt not in held_out]
    rng.shuffle(training)
    write([(tasks[prompt], prompt) for prompt in training], out / "prompts.jsonl")
    click.echo(f"{len(training)} prompts for training, {len(held_out)} held out, in {out}")


if __name__ == "__main__":
    main()
