"""A benchmark's record as one HTML page that needs nothing beside it, and its pictures as PNG files."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.benchmark import FORMAT, OURS, PEER, PLAIN, Record, summaries, worst
from mlxspec.evaluation.pictures import pictures

CAPTIONS = {
    "tasks": "Tokens per second by task, prefill included. Medians over interleaved rounds in one process.",
    "acceptance": "How often a drafted token is accepted, by its position in the block.",
    "draft-length": "Speed-up against the number of drafted tokens, measured, and predicted by the cost model.",
    "block": "Where the time of a block goes.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde3ea; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #55636f; font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { color: #55636f } dd { margin: 0 }
"""


def read_record(file: Path) -> Record:
    """A record that ``mlxspec bench`` wrote. Raises InvalidRequestError for anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        summaries(record)
        described(record)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}")
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be read: {error.strerror}; give a file of `mlxspec bench`") from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError):
        raise InvalidRequestError(f"{file} was not written by this version's `mlxspec bench`; run it again") from None
    return record


def write_report(record: Record, folder: Path) -> Path:
    """``index.html`` and the PNGs in ``folder``; the page. Raises InvalidRequestError if there is nothing to show."""
    if not summaries(record):
        raise InvalidRequestError("the benchmark was interrupted before its first round was finished; run it again")
    drawn = pictures(record)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        (folder / f"{name}.png").write_bytes(content)
    page = folder / "index.html"
    page.write_text(page_of(record, drawn), encoding="utf-8")
    return page


def page_of(record: Record, drawn: dict[str, bytes]) -> str:
    pair, rows = record["pair"], summaries(record)
    title = f"{pair['target']}, with {pair['drafter']} drafting"
    figures = "".join(
        f'<figure><img alt="{CAPTIONS[name]}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{CAPTIONS[name]}</figcaption></figure>"
        for name, content in drawn.items()
    )
    unfinished = (
        "" if record["complete"] else "<p><strong>Interrupted: only the finished rounds are shown.</strong></p>"
    )
    lowest = "Lowest τ: {task} at temperature {temperature:g}.".format(**worst(rows))
    engines = [line for row in rows for line in engine_cells(row)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{text(title)}</title><style>{STYLE}</style></head><body>
<h1>{text(title)}</h1>
<p>{text(headline(rows))}</p>{unfinished}
<h2>By task</h2><div class="wide">{table(HEADINGS, [cells(row) for row in rows])}</div>
<p>Ratios are of tokens per second of whole answers, taken within a round; in brackets the least and the most over the
rounds. τ: tokens for each pass of the target. MBSU: the speed-up where a step costs what it reads, with the drafter's
cost by parameters and by bytes. Same text: at temperature 0, whether all engines gave it. {text(lowest)}</p>
<h2>By engine</h2><div class="wide">{table(ENGINE_HEADINGS, engines)}</div>
<p>Tokens per second: of whole answers, of the prompt, and after the first token or block. Energy where it can be
read.</p>
<h2>Pictures</h2>{figures}
<h2>Measured on</h2><dl>{"".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in described(record))}</dl>
</body></html>
"""


HEADINGS = (
    "task",
    "T",
    "τ",
    "accepted",
    "γ",
    "/ mlx-lm plain",
    "/ mlx-lm speculative",
    "tokens/s",
    "MBSU",
    "same text",
)


def cells(row: Record) -> list[str]:
    """What the terminal's table and the page show of a row."""
    mbsu = f"{row['mbsu_parameters']:.2f} / {row['mbsu_step_bytes']:.2f}"
    same = {True: "yes", False: "no", None: "-"}[row["same_text"]]
    return [
        row["task"],
        f"{row['temperature']:g}",
        f"{row['block_efficiency']:.2f}",
        f"{row['acceptance_rate']:.2f}",
        f"{row['draft_length']:.1f}",
        ratio(row, PLAIN),
        ratio(row, PEER),
        f"{row['tokens_per_second'][OURS]:.1f}",
        mbsu,
        same,
    ]


ENGINE_HEADINGS = ("task", "T", "engine", "tokens/s", "prefill", "decode", "peak memory", "J/token")


def engine_cells(row: Record) -> list[list[str]]:
    """A line for each engine: tokens per second of whole answers, of the prompt, and after it."""

    def energy(name: str) -> str:
        joules = row["joules_per_token"][name]
        return "-" if joules is None else f"{joules:.3g}"

    return [
        [
            row["task"],
            f"{row['temperature']:g}",
            name,
            f"{row['tokens_per_second'][name]:.1f}",
            f"{row['prefill_tokens_per_second'][name]:.0f}",
            f"{row['decode_tokens_per_second'][name]:.1f}",
            f"{row['peak_memory_bytes'][name] / 1e6:.0f} MB",
            energy(name),
        ]
        for name in row["tokens_per_second"]
    ]


def ratio(row: Record, name: str) -> str:
    found = row["ratio"].get(name)
    return f"{found['median']:.2f} ({found['least']:.2f}-{found['most']:.2f})" if found else "-"


def headline(rows: list[Record]) -> str:
    """In one sentence: is it faster?"""
    ratios = [row["ratio"][PLAIN]["median"] for row in rows]
    slowest = worst(rows)
    verdict = "faster than" if min(ratios) > 1 else "slower than" if max(ratios) < 1 else "not always faster than"
    span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
    return (
        f"mlxspec is {verdict} mlx-lm's plain decoding here: {span} times its tokens per second; block efficiency is "
        f"{slowest['block_efficiency']:.2f} on the worst task, {slowest['task']}."
    )


def described(record: Record) -> list[tuple[str, str]]:
    pair, machine, settings = record["pair"], record["machine"], record["settings"]
    return [
        ("target", f"{pair['target']}, {pair['target_parameters']:,} parameters"),
        ("drafter", f"{pair['drafter']}, {pair['drafter_parameters']:,} parameters"),
        ("draft length", f"{settings['draft_length']}; mlx-lm's {settings['peer_draft_length']}"),
        ("answers", f"at most {settings['max_tokens']} tokens, {settings['rounds']} rounds after a warm-up"),
        ("machine", f"{machine['chip']}, {machine['cores']} cores, {machine['device']}, {machine['system']}"),
        ("versions", f"mlxspec {machine['mlxspec']} ({machine['revision'] or 'no checkout'}), MLX {machine['mlx']}, "
                     f"mlx-lm {machine['mlx_lm']}, Python {machine['python']}"),
    ]  # fmt: skip


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{text(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text(value: Any) -> str:
    return html.escape(str(value))
