"""Speculative decoding: keep blocks in flight, read the result of each once, cut what comes out of them.

Two, unless the draft of the second depends on what became of the first, as it does stepwise.
What happens inside a block is in ``block.py``; who drafts how many tokens, in ``draft_length.py``.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxspec.decoding.block import CompiledBlocks, State
from mlxspec.decoding.cache import with_room
from mlxspec.decoding.choice import LONGEST_CHOICE, MODEL, NOBODY, PLAIN, STEPWISE, Choice
from mlxspec.decoding.draft_length import Chooser, chooser_for
from mlxspec.decoding.drafting import Drafters
from mlxspec.decoding.request import answer_budget, check_options
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.stepwise import Draft
from mlxspec.decoding.text import AnswerText, Segment
from mlxspec.errors import InvalidRequestError
from mlxspec.models.pair import ModelPair
from mlxspec.models.tokens import encode_prompt

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


class Launched(NamedTuple):
    """A block that is on its way."""

    choice: Choice
    result: mx.array
    draft: Draft | None  # if it was made stepwise


class SpeculativeDecoder:
    """Decodes with a pair; the text is distributed exactly as the target's own, whatever the drafter proposes.

    ``draft_length`` is the number of tokens drafted a block: 0 is plain decoding; "auto" chooses between the pair's
    drafter, its ``lookup`` and nobody, and drafts up to 16 tokens, by what a block costs on this device, which is
    measured when it is first needed and then known, by how many tokens were accepted so far (``draft_length.py``) and
    by how sure the drafter is of the next (``stepwise.py``).
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
        check_options(draft_length, verification)
        self.pair = pair
        self.stats = DecodingStats()
        self.draft_length = draft_length
        self.compiled = CompiledBlocks(pair, sampling or Sampling(), verification, drafting=draft_length != 0)
        self.drafters = Drafters(self.compiled.proposers)
        self._chooser: Chooser | None = None
        self._state: State | None = None
        self._drafting = NOBODY  # whose state is in there
        self._tokens: list[int] = []  # committed: prompt and answer
        self._stream = 0  # which call of ``blocks`` owns the state

    @property
    def sampling(self) -> Sampling:
        """Fixed, as it is compiled into the blocks."""
        return self.compiled.sampling

    @property
    def chooser(self) -> Chooser:
        """Who says what the next block is; what "auto" needs to know of costs is measured here if nobody knows."""
        if self._chooser is None:
            self._chooser = chooser_for(self.compiled, self.draft_length)
        return self._chooser

    def forget(self) -> None:
        """Drop the caches, as if nothing had been decoded; how often drafts were accepted is not forgotten."""
        self._state, self._tokens = None, []
        self.drafters.forget_beyond(0)
        self._stream += 1

    def blocks(
        self,
        prompt: Sequence[int],
        max_tokens: int = 256,
        progress: Progress | None = None,
        seed: int | None = None,
    ) -> Iterator[Block]:
        """Decode token ids; the concatenated ``Block.tokens`` are the answer, an EOS included.

        ``max_tokens`` −1 goes on until an EOS or a full context. ``progress`` is told of the prompt's prefill. ``seed``
        takes the place of the sampling's; it repeats a text exactly, if ``draft_length`` is "auto" on a decoder that
        has seen the same before. Raises InvalidRequestError at once for an empty prompt or one that leaves no
        room in the context, and later if another stream is started on this decoder.
        """
        prompt = [int(token) for token in prompt]
        budget = answer_budget(prompt, max_tokens, self.pair.context_length, self.compiled.target.vocab_size)
        seed = self.sampling.seed if seed is None else seed
        key = mx.random.key(int.from_bytes(os.urandom(8), "big") if seed is None else seed)
        self._stream += 1
        return self._run(prompt, budget, progress or (lambda done, total: None), key, self._stream)

    def _run(self, prompt: list[int], budget: float, progress: Progress, key: mx.array, stream: int) -> Iterator[Block]:
        self._check_owner(stream)
        self._prefill(prompt, progress, key, budget)
        eos, start = self.pair.eos_token_ids, time.perf_counter()
        in_flight: deque[Launched] = deque()
        while self.stats.tokens < budget:
            while self._may_launch(in_flight, budget):
                in_flight.append(self._launch([block.choice for block in in_flight], budget))
            choice, result, draft = in_flight.popleft()
            *tokens, accepted = result.tolist()  # the one host read, but for those within a stepwise draft
            tokens = tokens[: min(accepted + 1, budget - self.stats.tokens)]
            end = next((i for i, token in enumerate(tokens, 1) if token in eos), None)
            tokens = tokens[:end]
            self._tokens += tokens
            self.chooser.observe(choice, tokens, accepted, self._behind(), draft)
            self.stats.add(len(tokens), choice, accepted, draft.steps - draft.length if draft else 0)
            self.stats.decode_seconds = time.perf_counter() - start
            self.stats.peak_memory_bytes = mx.get_peak_memory()
            yield Block(tokens, choice.length, accepted)
            if end is not None:
                return
            self._check_owner(stream)

    def _may_launch(self, in_flight: deque[Launched], budget: float) -> bool:
        """Whether to queue one more block: not one that will probably be thrown away, nor past a change of drafters.

        Stepwise, the next draft waits for the last block anyway.
        """
        if not in_flight:
            return True
        choice = self.chooser.choice
        if len(in_flight) == BLOCKS_IN_FLIGHT or choice == STEPWISE or choice.proposer != self._drafting:
            return False
        return self.chooser.chance_of(in_flight[0].choice, budget - self.stats.tokens) < 0.5

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        seed: int | None = None,
    ) -> Iterator[Segment]:
        """Decode to text as it comes; the last segment carries the finish_reason.

        A text prompt goes through the tokenizer's chat template if it has one, unless ``raw``; token ids are taken
        as they are. The rest is as for ``blocks``. Raises InvalidRequestError at once for a bad prompt or an empty stop
        string.
        """
        if self.pair.tokenizer is None:
            raise InvalidRequestError("this pair has no tokenizer; use blocks() for token ids")
        if isinstance(prompt, str):
            prompt = encode_prompt(self.pair.tokenizer, prompt, system, raw)
        text = AnswerText(self.pair.tokenizer, self.pair.eos_token_ids, stop)
        blocks = self.blocks(prompt, max_tokens, progress, seed)
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

    def _launch(self, in_flight: list[Choice], budget: float) -> Launched:
        """Queue one block behind those in flight; its result is an array that nothing has waited for."""
        choice, missing = self.chooser.choice, budget - self.stats.tokens
        if choice == STEPWISE and missing <= 1:
            choice = PLAIN  # a drafter that did not step would not see the tokens before that one either
        if choice.proposer != self._drafting:  # nothing is in flight then
            state = self._set_aside()
            state["drafter"] = self.drafters.ready(choice.proposer, self._tokens)
            self._state, self._drafting = state, choice.proposer
            del state
        most, draft = choice.length, None
        if choice == STEPWISE:
            most = int(min(missing - 1, LONGEST_CHOICE))  # one token is the target's own
            draft = self.chooser.draft(most)
        longest = len(self._tokens) + sum(length + 1 for _, length in in_flight) + most + 1
        # Nothing may refer to the old state when the new one is evaluated: a buffer that somebody else holds would be
        # copied instead of written in place.
        if draft is None:
            result, self._state = self.compiled[choice](self._state_with_room(longest))
        else:  # and begin with the next draft
            opening = self.chooser.opening()
            result, self._state = self.compiled.stepwise(
                self._state_with_room(longest + opening), draft, opening, missing
            )
            choice = Choice(MODEL, draft.length)
        mx.async_eval(result, self._state)
        return Launched(choice, result, draft)

    def _set_aside(self) -> State:
        """Keep the drafter's state for when it drafts again, though not the draft that it may have begun. -> the rest

        Taken from the decoder: if what follows is interrupted, the next prompt starts from nothing.
        """
        state, self._state = self._state, None
        state.pop("opened", None)
        self.drafters.put_back(self._drafting, state.pop("drafter"), max(0, len(self._tokens) - 2))
        return state

    def _behind(self) -> int:
        """Tokens that the model drafter has not seen, as far as it is not drafting."""
        return 0 if self._drafting == MODEL else self.drafters.behind(MODEL, len(self._tokens))

    def _state_with_room(self, length: int) -> State:
        """The state, taken from the decoder: if the block fails, the next prompt starts from nothing."""
        state, self._state = self._state, None
        state["target"] = with_room(state["target"], length)
        state["drafter"] = self.compiled.proposers[self._drafting].with_room(state["drafter"], length)
        return state

    def _prefill(self, prompt: list[int], progress: Progress, key: mx.array, budget: float) -> None:
        """Bring the caches to the prompt, reusing what they share with it; that of a drafter if it is to draft."""
        chooser = self.chooser  # which may have to measure something
        mx.reset_peak_memory()
        start = time.perf_counter()
        # The caches are taken from the decoder, for the same reasons as above; of other weights they are of no use.
        reused = self._reusable(prompt) if self.compiled.weights.note() and self._state else 0
        old = self._set_aside() if self._state else {}
        self.drafters.forget_beyond(reused)
        chooser.begin(prompt, budget, self.drafters.behind(MODEL, len(prompt)))
        drafting = chooser.choice.proposer
        passes = 1 + self.compiled.proposers[drafting].prefills
        new, done = len(prompt) - reused, 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(reused + min(done // passes, new - 1), len(prompt))

        state = {
            "recent": mx.array(prompt[-2:], mx.int32),
            "committed": mx.array(len(prompt), mx.int32),
            "target": self.compiled.target.prefill(
                mx.array(prompt[reused:-1], mx.int32), old.pop("target", None) if reused else None, reused, advanced
            ),
            "drafter": self.drafters.ready(drafting, prompt, advanced),
            "key": key,
        }
        mx.eval(state)
        self._state, self._drafting, self._tokens = state, drafting, list(prompt)
        progress(len(prompt), len(prompt))
        seconds = time.perf_counter() - start
        self.stats = DecodingStats(prompt_tokens=len(prompt), prompt_tokens_reused=reused, prompt_seconds=seconds)

    def _reusable(self, prompt: list[int]) -> int:
        """Leading tokens of the prompt that both caches hold: all but the last two committed ones can be kept."""
        limit = min(len(prompt), len(self._tokens)) - 2
        return next((i for i in range(limit) if prompt[i] != self._tokens[i]), max(limit, 0))
