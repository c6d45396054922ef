"""Rows of a public data set, a page at a time, through the hub's rows service; no copy of the whole set, no parquet."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import huggingface_hub

from mlxspec.errors import InvalidRequestError, in_one_line

ROWS = "https://datasets-server.huggingface.co/rows"
PAGE = 100  # the most that the service gives
SECONDS = 30.0


class HubSet(NamedTuple):
    """Where some rows are."""

    name: str
    config: str
    split: str


def rows_of(source: HubSet) -> Iterator[dict[str, Any]]:
    """All rows, in order. Raises InvalidRequestError where they cannot be had."""
    offset = 0
    while True:
        asked = {"dataset": source.name, "config": source.config, "split": source.split, "offset": offset}
        try:
            reply = huggingface_hub.get_session().get(ROWS, params={**asked, "length": PAGE}, timeout=SECONDS)
            reply.raise_for_status()
            rows = [entry["row"] for entry in reply.json()["rows"]]
        except Exception as error:  # of the network, of the service, of what it says
            raise InvalidRequestError(
                f"{source.name} cannot be read from the hub now ({in_one_line(error)}); connect to the network, or "
                "give prompts in a .jsonl file"
            ) from None
        yield from rows
        offset += len(rows)
        if len(rows) < PAGE:
            return
