"""Speculative decoding: a block is one compiled graph, and its result is read once.

Read ``SpeculativeDecoder._block`` first: it is the algorithm. The rest of the class keeps two blocks in flight and
cuts what comes out of them.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlxspec.decoding.cache import CachedModel, with_room
from mlxspec.decoding.drafting import proposer_for
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.text import AnswerText, Segment
from mlxspec.decoding.verification import RULES
from mlxspec.errors import InvalidRequestError
from mlxspec.models.pair import ModelPair
from mlxspec.models.tokens import encode_prompt

DEFAULT_DRAFT_LENGTH = 4  # 5 rows are the cheap zone of Metal's quantised kernels
BLOCKS_IN_FLIGHT = 2

Progress = Callable[[int, int], None]  # prompt tokens done, prompt tokens in all


@dataclass(frozen=True)
class Block:
    """What one target pass yielded: ``accepted`` of ``drafted`` tokens, and one of the target's own.

    ``tokens`` are accepted + 1, fewer where max_tokens, the context or an EOS cuts the block.
    """

    tokens: list[int]
    drafted: int
    accepted: int


class SpeculativeDecoder:
    """Decodes with a pair; the text is distributed exactly as the target's own, whatever the drafter proposes.

    ``draft_length`` is the number of tokens drafted a block: 0 is plain decoding, "auto" for now a fixed 4.
    ``verification`` names the rule: "block", "token" or "match". One stream at a time: starting another ends the
    first. Raises InvalidRequestError for options out of range and UnsupportedModelError for a model that cannot be
    rewound.
    """

    def __init__(
        self,
        pair: ModelPair,
        sampling: Sampling | None = None,
        draft_length: int | str = "auto",
        verification: str = "block",
    ):
        self.pair = pair
        self.sampling = sampling or Sampling()
        self.draft_length = checked_draft_length(draft_length) if pair.drafter is not None else 0
        if verification not in RULES:
            raise InvalidRequestError(f"verification is {verification!r}; use one of {', '.join(RULES)}")
        self.stats = DecodingStats()
        self._verify = RULES[verification]
        self._target = CachedModel(pair.target)
        drafter = pair.drafter if self.draft_length else None
        self._proposer = proposer_for(drafter, self.sampling, self._target.vocab_size)
        # Weights are inputs: a compiled function would keep those it closed over as they were when it was traced.
        weights = [pair.target.state, self._proposer.weights]
        self._compiled = mx.compile(partial(self._block, self.draft_length), inputs=weights)
        self._state = None
        self._tokens: list[int] = []  # committed: prompt and answer
        self._stream = 0  # which call of ``blocks`` owns the state

    def _block(self, draft_length: int, state: dict) -> tuple[mx.array, dict]:
        """Draft, verify, commit; all lazy. -> result [γ+2] (γ+1 tokens and the accepted count), the next state.

        The target's cache covers ``committed − 1`` tokens, the drafter's ``committed − len(recent)``: what a rejected
        draft left behind them is rewound by nothing more than ``committed`` growing less.
        """
        recent, committed = state["recent"], state["committed"]
        key, subkey = mx.random.split(state["key"])
        uniforms = mx.random.uniform(shape=(2 * draft_length + 1,), key=subkey)

        drafted, q, drafter = self._proposer.propose(state["drafter"], recent, committed, uniforms[:draft_length])
        rows = mx.concatenate([recent[-1:], drafted])  # [γ+1]
        logits, target = self._target(rows, state["target"], committed - 1)
        p = self.sampling.probs(logits)  # [γ+1, V]
        accepted, next_token = self._verify(p, q, drafted, uniforms[draft_length:])

        padded = mx.concatenate([drafted, mx.zeros(1, mx.int32)])
        emitted = mx.where(mx.arange(draft_length + 1) < accepted, padded, next_token)  # [γ+1]
        last_two = recent.shape[0] + accepted - 1 + mx.arange(2)
        return mx.concatenate([emitted, accepted.reshape(1)]), {
            "recent": mx.concatenate([recent, emitted])[last_two],
            "committed": committed + accepted + 1,
            "target": target,
            "drafter": self._proposer.record(drafter, committed, emitted),
            "key": key,
        }

    def blocks(self, prompt: Sequence[int], max_tokens: int = 256, progress: Progress | None = None) -> Iterator[Block]:
        """Decode token ids; the concatenated ``Block.tokens`` are the answer, an EOS included.

        ``max_tokens`` −1 goes on until an EOS or a full context. ``progress`` is told of the prompt's prefill.
        Raises InvalidRequestError at once for an empty prompt or one that leaves no room in the context.
        """
        prompt = [int(token) for token in prompt]
        budget = self._budget(prompt, max_tokens)
        self._stream += 1
        return self._run(prompt, budget, progress or (lambda done, total: None), self._stream)

    def _run(self, prompt: list[int], budget: float, progress: Progress, stream: int) -> Iterator[Block]:
        self._prefill(prompt, progress)
        eos, in_flight, start = self.pair.eos_token_ids, deque(), time.perf_counter()
        while self.stats.tokens < budget:
            # Each block in flight yields at least one token: never start one that is sure to be thrown away.
            while len(in_flight) < BLOCKS_IN_FLIGHT and self.stats.tokens + len(in_flight) < budget:
                in_flight.append(self._launch(len(in_flight)))
            *tokens, accepted = in_flight.popleft().tolist()  # the one host read
            tokens = tokens[: min(accepted + 1, budget - self.stats.tokens)]
            end = next((i for i, token in enumerate(tokens, 1) if token in eos), None)
            tokens = tokens[:end]
            self._tokens += tokens
            self.stats.add(len(tokens), self.draft_length, accepted)
            self.stats.decode_seconds = time.perf_counter() - start
            self.stats.peak_memory_bytes = mx.get_peak_memory()
            yield Block(tokens, self.draft_length, accepted)
            if end is not None:
                return
            if self._stream != stream:
                raise InvalidRequestError("this stream has ended: another one was started on the same decoder")

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Segment]:
        """Decode to text as it comes; the last segment carries the finish_reason.

        A text prompt goes through the tokenizer's chat template if it has one, unless ``raw``; token ids are taken
        as they are. Raises InvalidRequestError at once for a bad prompt or an empty stop string.
        """
        if self.pair.tokenizer is None:
            raise InvalidRequestError("this pair has no tokenizer; use blocks() for token ids")
        if isinstance(prompt, str):
            prompt = encode_prompt(self.pair.tokenizer, prompt, system, raw)
        text = AnswerText(self.pair.tokenizer, self.pair.eos_token_ids, stop)
        return self._segments(self.blocks(prompt, max_tokens, progress), text)

    def _segments(self, blocks: Iterator[Block], text: AnswerText) -> Iterator[Segment]:
        consumed, drafted = [], False
        for block in blocks:
            for i, token in enumerate(block.tokens):
                consumed.append(token)
                drafted = i < block.accepted
                shown = text.add(token)
                if text.ended:
                    self._uncommit(len(block.tokens) - i - 1)
                    blocks.close()
                    break
                if shown:
                    yield Segment(shown, consumed, drafted)
                    consumed = []
        yield Segment(text.finish(), consumed, drafted, "stop" if text.ended else "length")

    def _uncommit(self, count: int) -> None:
        """Take back the last ``count`` tokens, which a stop string cut off."""
        self.stats.tokens -= count
        del self._tokens[len(self._tokens) - count :]

    def _launch(self, in_flight: int) -> mx.array:
        """Queue one block; its result is an array that nothing has waited for."""
        longest = len(self._tokens) + (in_flight + 1) * (self.draft_length + 1)
        state = self._state
        state["target"] = with_room(state["target"], longest)
        state["drafter"] = self._proposer.with_room(state["drafter"], longest)
        del state
        # The new state replaces the old one before it is evaluated: a buffer that something else still refers to
        # would be copied instead of written in place.
        result, self._state = self._compiled(self._state)
        mx.async_eval(result, self._state)
        return result

    def _prefill(self, prompt: list[int], progress: Progress) -> None:
        """Bring both caches to the prompt, reusing what they share with it, and draw the keys anew."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        # Nothing but the prefill may refer to the old buffers, or they would be copied; and if it is interrupted, the
        # next prompt starts from nothing.
        old, self._state = self._state or {}, None
        reused = self._reusable(prompt) if old else 0
        todo, done = 2 * (len(prompt) - reused), 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(reused + done * (len(prompt) - reused) // todo, len(prompt))

        seed = self.sampling.seed if self.sampling.seed is not None else int.from_bytes(os.urandom(8), "big")
        self._state = {
            "recent": mx.array(prompt[-2:], mx.int32),
            "committed": mx.array(len(prompt), mx.int32),
            "target": self._target.prefill(prompt[reused:-1], old.pop("target", None), reused, advanced),
            "drafter": self._proposer.start(old.pop("drafter", None), prompt, reused, advanced),
            "key": mx.random.key(seed),
        }
        mx.eval(self._state)
        self._tokens = list(prompt)
        seconds = time.perf_counter() - start
        self.stats = DecodingStats(prompt_tokens=len(prompt), prompt_tokens_reused=reused, prompt_seconds=seconds)

    def _reusable(self, prompt: list[int]) -> int:
        """Leading tokens of the prompt that both caches hold: all but the last two committed ones can be kept."""
        limit = min(len(prompt), len(self._tokens)) - 2
        return next((i for i in range(limit) if prompt[i] != self._tokens[i]), max(limit, 0))

    def _budget(self, prompt: list[int], max_tokens: int) -> float:
        """How many tokens may be emitted."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if max_tokens < -1:
            raise InvalidRequestError(f"max_tokens is {max_tokens}; use 0 or more, or -1 for as many as fit")
        outside = next((token for token in prompt if not 0 <= token < self._target.vocab_size), None)
        if outside is not None:
            raise InvalidRequestError(
                f"token id {outside} in the prompt is outside the target's vocabulary of {self._target.vocab_size}"
            )
        context = self.pair.context_length or float("inf")
        if len(prompt) >= context:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens and the target's context holds {context}; shorten it to at "
                f"most {context - 1}"
            )
        return min(context - len(prompt), max_tokens if max_tokens >= 0 else float("inf"))


def checked_draft_length(draft_length: int | str) -> int:
    if draft_length == "auto":
        return DEFAULT_DRAFT_LENGTH
    if isinstance(draft_length, bool) or not isinstance(draft_length, int) or draft_length < 0:
        raise InvalidRequestError(f'draft length is {draft_length!r}; use 0 (no drafting) or more, or "auto"')
    return draft_length
