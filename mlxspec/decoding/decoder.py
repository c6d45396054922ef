"""Speculative decoding: keep two blocks in flight, read the result of each once, cut what comes out of them.

What happens inside a block is in ``block.py``.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.block import BlockParts, CompiledBlock, State
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
LONGEST_DRAFT = 64  # a block is unrolled when it is compiled
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
        if verification not in RULES:
            raise InvalidRequestError(f"verification is {verification!r}; use one of {', '.join(RULES)}")
        self.pair = pair
        self.stats = DecodingStats()
        sampling, draft_length = sampling or Sampling(), checked_draft_length(draft_length)
        drafter = pair.drafter if draft_length else None
        target = CachedModel(pair.target)
        proposer = proposer_for(drafter, sampling, target.vocab_size)
        self._parts = BlockParts(target, proposer, RULES[verification], sampling, draft_length if drafter else 0)
        self._block = CompiledBlock(self._parts, [m for m in (pair.target, drafter) if isinstance(m, nn.Module)])
        self._state: State | None = None
        self._tokens: list[int] = []  # committed: prompt and answer
        self._stream = 0  # which call of ``blocks`` owns the state

    @property
    def sampling(self) -> Sampling:
        """Fixed, as it is compiled into the block."""
        return self._parts.sampling

    @property
    def draft_length(self) -> int:
        """Tokens drafted a block; fixed, as it is compiled into the block."""
        return self._parts.draft_length

    def blocks(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        progress: Progress | None = None,
        seed: int | None = None,
    ) -> Iterator[Block]:
        """Decode token ids; the concatenated ``Block.tokens`` are the answer, an EOS included.

        ``max_tokens`` −1 goes on until an EOS or a full context. ``progress`` is told of the prompt's prefill. ``seed``
        takes the place of the sampling's. Raises InvalidRequestError at once for an empty prompt or one that leaves no
        room in the context, and later if another stream is started on this decoder.
        """
        prompt = [int(token) for token in prompt]
        budget = self._budget(prompt, max_tokens)
        seed = self.sampling.seed if seed is None else seed
        key = mx.random.key(int.from_bytes(os.urandom(8), "big") if seed is None else seed)
        self._stream += 1
        return self._run(prompt, budget, progress or (lambda done, total: None), key, self._stream)

    def _run(self, prompt: list[int], budget: float, progress: Progress, key: mx.array, stream: int) -> Iterator[Block]:
        self._check_owner(stream)
        self._prefill(prompt, progress, key)
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
            self._check_owner(stream)

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
        blocks = self.blocks(prompt, max_tokens, progress)
        return self._segments(blocks, text, self._stream)

    def _check_owner(self, stream: int) -> None:
        if self._stream != stream:
            raise InvalidRequestError("this stream has ended: another one was started on the same decoder")

    def _segments(self, blocks: Iterator[Block], text: AnswerText, stream: int) -> Iterator[Segment]:
        consumed, drafted = [], False
        for block in blocks:
            for i, token in enumerate(block.tokens):
                consumed.append(token)
                drafted = i < block.accepted
                shown = text.add(token)
                if text.ended:
                    self._check_owner(stream)
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
        # Nothing may refer to the old state when the new one is evaluated: a buffer that somebody else holds would be
        # copied instead of written in place.
        result, self._state = self._block(self._state_with_room(longest))
        mx.async_eval(result, self._state)
        return result

    def _state_with_room(self, length: int) -> State:
        """The state, taken from the decoder: if the block fails, the next prompt starts from nothing."""
        state, self._state = self._state, None
        state["target"] = with_room(state["target"], length)
        state["drafter"] = self._parts.proposer.with_room(state["drafter"], length)
        return state

    def _prefill(self, prompt: list[int], progress: Progress, key: mx.array) -> None:
        """Bring both caches to the prompt, reusing what they share with it."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        # Taken from the decoder for the same reasons as above; and caches of other weights are of no use.
        old, self._state = self._state or {}, None
        reused = self._reusable(prompt) if self._block.note_weights() and old else 0
        proposer, new, done = self._parts.proposer, len(prompt) - reused, 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(reused + min(done // (1 + proposer.prefills), new - 1), len(prompt))

        to_target = mx.array(prompt[reused:-1], mx.int32)
        state = {
            "recent": mx.array(prompt[-2:], mx.int32),
            "committed": mx.array(len(prompt), mx.int32),
            "target": self._parts.target.prefill(to_target, old.pop("target", None), reused, advanced),
            "drafter": proposer.start(old.pop("drafter", None), prompt, reused, advanced),
            "key": key,
        }
        mx.eval(state)
        self._state, self._tokens = state, list(prompt)
        progress(len(prompt), len(prompt))
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
        vocab_size = self._parts.target.vocab_size
        outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise InvalidRequestError(
                f"token id {outside} in the prompt is outside the target's vocabulary of {vocab_size}"
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
    if type(draft_length) is not int or not 0 <= draft_length <= LONGEST_DRAFT:
        raise InvalidRequestError(
            f'draft length is {draft_length!r}; use 0 (no drafting) to {LONGEST_DRAFT}, or "auto"'
        )
    return draft_length
