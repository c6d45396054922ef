"""Speculative decoding: keep two blocks in flight, read each result once, truncate at EOS or max_tokens.

The block itself is in ``block.py``. Who drafts how many tokens is decided in ``policy.py``.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import wired_limit

from mlxspec.decoding import calibration
from mlxspec.decoding.block import State
from mlxspec.decoding.cache import with_room
from mlxspec.decoding.compiled import CompiledBlocks
from mlxspec.decoding.drafting import LOOKUP, MODEL, NONE, PLAIN, Choice, IdleStates, LookupProposer
from mlxspec.decoding.policy import Automatic, DraftPolicy, Fixed
from mlxspec.decoding.requests import (
    DEFAULT_DRAFT_LENGTH,
    DEFAULT_MAX_TOKENS,
    LONGEST_DRAFT,
    answer_budget,
    check_options,
)
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.text import AnswerText, Segment
from mlxspec.decoding.verification import DEFAULT_RULE, FAILED
from mlxspec.errors import InvalidRequestError, NumericalError
from mlxspec.models.pair import ModelPair
from mlxspec.models.sharding import broadcast
from mlxspec.models.tokens import encode_prompt

BLOCKS_IN_FLIGHT = 2

Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Block:
    """What one target pass yielded: ``accepted`` of ``drafted`` tokens, and one of the target's own.

    ``tokens`` are accepted + 1; fewer where max_tokens, the context, an EOS or a target that fails cuts the block.
    """

    tokens: list[int]
    drafted: int
    accepted: int


class SpeculativeDecoder:
    """Decodes with a pair. The text has exactly the target's distribution, with any drafter.

    One stream at a time: starting another ends the first.

    Args:
        pair: Target and drafters.
        sampling: How tokens are drawn; greedy by default. Compiled into the blocks, hence fixed.
        draft_length: Tokens drafted per block by the pair's drafter, 0 for plain decoding. Or "auto": for each block,
            choose between the drafter, the pair's ``lookup`` and no draft, and the length, by measured cost and
            acceptance (``policy.py``).
        verification: The rule: "block", "token" or "match".
        policy: A policy of your own. ``draft_length`` has no effect then.
        keep_top_k: How many of the target's most likely tokens to keep for each token of an answer, for ``kept_probs``.
            0 to keep none.

    Raises:
        InvalidRequestError: an option is out of range.
        UnsupportedModelError: a model cannot be rewound.
    """

    def __init__(
        self,
        pair: ModelPair,
        sampling: Sampling | None = None,
        draft_length: int | str = DEFAULT_DRAFT_LENGTH,
        verification: str = DEFAULT_RULE,
        policy: DraftPolicy | None = None,
        keep_top_k: int = 0,
    ):
        check_options(draft_length, verification)
        if type(keep_top_k) is not int or keep_top_k < 0 or keep_top_k == 1:
            raise InvalidRequestError(f"keep_top_k is {keep_top_k!r}; use 2 or more, or 0 to keep nothing")
        self.pair = pair
        self.stats = DecodingStats()
        self.draft_length = draft_length
        drafting = draft_length != 0 or policy is not None
        self.compiled = CompiledBlocks(pair, sampling or Sampling(), verification, drafting, keep_top_k)
        self._policy = policy or self._fixed_policy()
        self._idle = IdleStates(self.compiled.proposers)
        self._state: State | None = None
        self._proposer = NONE  # the one whose state is in there
        self._tokens: list[int] = []  # committed: prompt and answer
        self._stream = 0  # which call of ``blocks`` owns the state

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return self.compiled.sampling

    @property
    def policy(self) -> DraftPolicy:
        """What decides about each draft. Raises InvalidRequestError before ``calibrate`` where that is needed."""
        if self._policy is None:
            raise InvalidRequestError("the costs of this pair are not known yet; call calibrate() first")
        return self._policy

    @property
    def calibrated(self) -> bool:
        """Whether ``calibrate`` has nothing to measure."""
        return self._policy is not None or calibration.is_final(self.compiled)

    def calibrate(self, progress: Progress = lambda done, total: None, again: bool = False) -> None:
        """Measure what blocks cost on this device, for ``draft_length="auto"``.

        The figures are stored on disk. The first process of a pair takes two seconds or a little more, and so does one
        that finds figures missing. The next ones repeat what was measured less than three times, for about half a
        second each. ``blocks`` calls this if it was not called before.

        Args:
            progress: Called with the number of figures done and of all figures to measure.
            again: Measure everything again.
        """
        if self._policy is None or (again and isinstance(self._policy, Automatic)):
            costs = calibration.calibrate(self.compiled, progress, again)
            reach = self.pair.drafter_context_length or math.inf
            self._policy = Automatic(costs, self.compiled.drafters, self._ngram(), reach)

    def kept_probs(self) -> "KeptProbs":
        """Return the last answer with the target's distribution where each of its tokens was drawn.

        The distribution is the target's own, at temperature 1 and without filters. After an interrupted pass there is
        nothing to return, and all arrays are empty.

        Raises:
            InvalidRequestError: The decoder was made without ``keep_top_k``.
        """
        target, k = self.compiled.target, self.compiled.target.top_k
        if not k:
            raise InvalidRequestError("this decoder keeps no probabilities; make it with keep_top_k, such as 64")
        start, tokens = self.stats.prompt_tokens, list(self._tokens)
        if self._state is None or len(tokens) <= start:
            return KeptProbs([], [], np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        # The row of a token has the distribution of the next.
        ids, logprobs = (
            np.array(part[0, 0, start - 1 : len(tokens) - 1]) for part in self._state.target[target.layers]
        )
        return KeptProbs(tokens[:start], tokens[start:], ids, logprobs)

    def forget(self) -> None:
        """Free the caches, as if nothing had been decoded. What the policy has learned is kept."""
        self._state, self._tokens = None, []
        self._idle.truncate(0)
        self._stream += 1

    def blocks(
        self,
        prompt: Sequence[int],
        max_tokens: int = DEFAULT_MAX_TOKENS,
        progress: Progress = lambda done, total: None,
        seed: int | None = None,
    ) -> Generator[Block, None, None]:
        """Decode token ids. The concatenated ``Block.tokens`` are the answer, an EOS included.

        Args:
            prompt: Token ids. What they share with the last text is not computed again.
            max_tokens: Limit of the answer; −1 continues until an EOS or a full context.
            progress: Called with the number of prompt tokens read and of all prompt tokens.
            seed: Replaces the seed of the sampling. The same calls on a new decoder repeat the text, as long as the
                stored costs of the pair are the same.

        Raises:
            InvalidRequestError: at once for a prompt that is empty or leaves no room in the context; later if another
                stream is started on this decoder.
            NumericalError: after the last block, if the target computes NaN where the next token would be drawn.
        """
        prompt = [int(token) for token in prompt]
        budget = answer_budget(prompt, max_tokens, self.pair.context_length, self.compiled.target.vocab_size)
        seed = self.sampling.seed if seed is None else seed
        if seed is not None:
            Sampling(seed=seed)  # checks its range
        seed = int.from_bytes(os.urandom(8), "big") if seed is None else seed
        prompt, budget, seed = broadcast((prompt, budget, seed), self.pair.group)
        key = mx.random.key(seed)
        self._stream += 1
        return self._run(prompt, budget, progress, key, self._stream)

    def _run(
        self, prompt: list[int], budget: float, progress: Progress, key: mx.array, stream: int
    ) -> Generator[Block, None, None]:
        self._check_owner(stream)
        self.calibrate()
        with ExitStack() as stack:
            with redirect_stdout(sys.stderr):  # mlx-lm may print a warning
                stack.enter_context(wired_limit(self.pair.target))
            yield from self._decode(prompt, budget, progress, key, stream)

    def _decode(
        self, prompt: list[int], budget: float, progress: Progress, key: mx.array, stream: int
    ) -> Generator[Block, None, None]:
        self._prefill(prompt, progress, key, budget)
        eos, start = self.pair.eos_token_ids, time.perf_counter()
        in_flight: deque[InFlight] = deque()
        while self.stats.tokens < budget:
            while choice := self._next_choice(in_flight, budget):
                in_flight.append(self._launch(choice, in_flight))
            block = in_flight.popleft()
            *tokens, accepted = cast(list[int], block.result.tolist())  # the one host read of a block
            tokens = tokens[: int(min(accepted + 1, budget - self.stats.tokens))]
            end = next((i for i, token in enumerate(tokens, 1) if token in eos), None)
            tokens = tokens[:end]
            if failed := tokens[-1:] == [FAILED]:
                tokens.pop()
            self._tokens += tokens
            self.policy.observe(block.choice, tokens, accepted, self._unread())
            self.stats.add(len(tokens), block.choice, accepted)
            self.stats.decode_seconds = time.perf_counter() - start
            self.stats.peak_memory_bytes = mx.get_peak_memory()
            self.stats.dropped_blocks = len(in_flight)
            yield Block(tokens, block.choice.length, accepted)
            if failed:
                raise NumericalError(
                    f"the target computes NaN or infinity instead of probabilities after {len(self._tokens)} tokens; "
                    "load it in a wider precision (dtype), or check its weights"
                )
            if end is not None:
                return
            self._check_owner(stream)

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
        progress: Progress = lambda done, total: None,
        seed: int | None = None,
    ) -> Iterator[Segment]:
        """Decode to text as it comes; the last segment carries the finish_reason.

        Args:
            prompt: text, which goes through the tokenizer's chat template if it has one; or token ids, as they are.
            max_tokens: as for ``blocks``.
            stop: the answer ends before the first of these strings.
            system: a system prompt, for a chat template that takes one.
            raw: leave out the chat template.
            progress: as for ``blocks``.
            seed: as for ``blocks``.

        Raises:
            InvalidRequestError: at once for a bad prompt or an empty stop string.
        """
        if self.pair.tokenizer is None:
            raise InvalidRequestError("this pair has no tokenizer; use blocks() for token ids")
        if isinstance(prompt, str):
            prompt = encode_prompt(self.pair.tokenizer, prompt, system, raw)
        text = AnswerText(self.pair.tokenizer, self.pair.eos_token_ids, stop)
        blocks = self.blocks(prompt, max_tokens, progress, seed)
        return self._segments(blocks, text, self._stream)

    def _segments(self, blocks: Generator[Block, None, None], text: AnswerText, stream: int) -> Iterator[Segment]:
        consumed: list[int] = []
        drafted = False
        try:
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
        except NumericalError:
            yield Segment(text.finish(), consumed, drafted)
            raise
        yield Segment(text.finish(), consumed, drafted, "stop" if text.ended else "length")

    def _check_owner(self, stream: int) -> None:
        if self._stream != stream:
            raise InvalidRequestError(
                "this stream has ended: another one was started on the same decoder, or it was reset"
            )

    def _uncommit(self, count: int) -> None:
        """Take back the last ``count`` tokens, which a stop string cut off."""
        self.stats.tokens -= count
        del self._tokens[len(self._tokens) - count :]

    def _next_choice(self, in_flight: "deque[InFlight]", budget: float) -> Choice | None:
        """Return the next block to queue, None if it has to wait.

        It waits if the answer will probably end with the block in flight, or if another proposer is to draft: that one
        reads the tokens of the blocks in flight first.
        """
        missing = budget - self.stats.tokens
        if in_flight:
            ending = self.policy.expected_tokens(in_flight[0].choice) > missing - 0.5
            if len(in_flight) == BLOCKS_IN_FLIGHT or ending:
                return None
        length = self._longest(in_flight)
        if not self._fits(PLAIN, length):
            return None  # how long the text really is will be known when the block in flight is read
        choice = self._choose(missing - len(in_flight), length)
        return None if in_flight and choice.proposer != self._proposer else choice

    def _longest(self, in_flight: "deque[InFlight]") -> int:
        """Return the length of the text, in tokens, if all drafts in flight are accepted."""
        return len(self._tokens) + sum(block.choice.length + 1 for block in in_flight)

    def _choose(self, missing: float, length: int) -> Choice:
        """Return the policy's choice for the next block, or ``PLAIN`` where a model would be asked beyond its context.

        Args:
            missing: Tokens that the answer may still have.
            length: Length of the text, in tokens.

        Raises:
            InvalidRequestError: No block of this pair can be what the policy chose.
        """
        choice = self.policy.choose(missing)
        if choice.proposer not in self.compiled.proposers:
            raise InvalidRequestError(
                f"the policy chose {choice.proposer!r} to draft, and this pair has only "
                f"{', '.join(self.compiled.proposers)}; give the pair such a drafter or choose another"
            )
        if not 0 <= choice.length <= LONGEST_DRAFT or (choice.length == 0) != (choice.proposer == NONE):
            raise InvalidRequestError(
                f"the policy chose to draft {choice.length} tokens by {choice.proposer!r}; choose 1 to {LONGEST_DRAFT} "
                f"tokens, or PLAIN"
            )
        return choice if self._fits(choice, length) else PLAIN

    def _fits(self, choice: Choice, length: int) -> bool:
        """Return whether a block after ``length`` tokens of text stays within the contexts of its models, in every row.

        A model with a table of positions would read memory beyond the table.
        """
        contexts = [self.pair.context_length, self.pair.drafter_context_length if choice.proposer == MODEL else None]
        return all(context is None or length + choice.length <= context for context in contexts)

    def _launch(self, choice: Choice, in_flight: "deque[InFlight]") -> "InFlight":
        """Queue one block after those in flight. Nothing waits for its result."""
        if choice.proposer != self._proposer:
            self._change_proposer(choice.proposer)
        length = self._longest(in_flight) + choice.length + 1
        # Nothing may refer to the old state when the new one is evaluated: a buffer that something else holds would
        # be copied instead of written in place.
        result, self._state = self.compiled[choice](self._take_state(length))
        mx.async_eval(result, self._state)
        return InFlight(choice, result)

    def _take_state(self, length: int) -> State:
        """Take the state out of the decoder, with room for ``length`` tokens."""
        state = self._detach()
        return state._replace(
            target=with_room(state.target, length),
            drafter=self.compiled.proposers[self._proposer].with_room(state.drafter, length),
        )

    def _detach(self) -> State:
        """Take the state out of the decoder. If what follows is interrupted, the next prompt starts from nothing."""
        state, self._state = self._state, None
        assert state is not None, "a state is there from the prefill on"
        return state

    def _change_proposer(self, name: str) -> None:
        """Set the state of the present proposer aside and take that of another, which reads what it missed."""
        state = self._detach()
        self._idle.put_back(self._proposer, state.drafter, max(0, len(self._tokens) - 2))
        drafter = self._idle.take(name, self._tokens, state.target)
        self._state, self._proposer = state._replace(drafter=drafter), name

    def _unread(self) -> int:
        """Return the tokens that the model drafter would have to read if it were to draft next."""
        return 0 if self._proposer == MODEL else self._idle.unread(MODEL, len(self._tokens))

    def _prefill(self, prompt: list[int], progress: Progress, key: mx.array, budget: float) -> None:
        """Prefill the prompt, reusing the shared prefix. An idle draft model is not prefilled."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        # Caches of other weights are of no use.
        changed = self.compiled.weights.changed()  # noted here in any case, for the traces that follow
        reused = self._reusable(prompt) if self._state and not changed else 0
        kept: list[Any] = []
        if self._state is not None:
            old = self._detach()
            self._idle.put_back(self._proposer, old.drafter, max(0, len(self._tokens) - 2))
            kept = [old.target] if reused else []
            del old
        self._idle.truncate(reused)
        self.policy.start(prompt, budget, self._idle.unread(MODEL, len(prompt)))
        proposer = self._choose(budget, len(prompt)).proposer
        passes = 1 + self.compiled.proposers[proposer].reads
        new, done = len(prompt) - reused, 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(reused + min(done // passes, new - 1), len(prompt))

        unread = mx.array(prompt[reused:-1], mx.int32)
        target = self.compiled.target.prefill(unread, kept, reused, advanced)
        state = State(
            recent=mx.array(prompt[-2:], mx.int32),
            committed=mx.array(len(prompt), mx.int32),
            target=target,
            drafter=self._idle.take(proposer, prompt, target, advanced),
            key=key,
        )
        del target
        mx.eval(state)
        self._state, self._proposer, self._tokens = state, proposer, list(prompt)
        progress(len(prompt), len(prompt))
        seconds = time.perf_counter() - start
        self.stats = DecodingStats(prompt_tokens=len(prompt), prompt_tokens_reused=reused, prompt_seconds=seconds)

    def _reusable(self, prompt: list[int]) -> int:
        """Return how many leading tokens of the prompt all caches hold: all but the last two committed ones."""
        limit = min(len(prompt), len(self._tokens)) - 2
        return next((i for i in range(limit) if prompt[i] != self._tokens[i]), max(limit, 0))

    def _fixed_policy(self) -> DraftPolicy | None:
        """Return the policy where nothing has to be chosen."""
        drafters = self.compiled.drafters
        if not drafters:
            return Fixed(PLAIN)
        return Fixed(Choice(drafters[0], self.draft_length)) if isinstance(self.draft_length, int) else None

    def _ngram(self) -> int:
        lookup = self.compiled.proposers.get(LOOKUP)
        return lookup.lookup.ngram if isinstance(lookup, LookupProposer) else 0


class KeptProbs(NamedTuple):
    """An answer of N tokens, and the target's k most likely tokens where each was drawn."""

    prompt: list[int]
    answer: list[int]
    ids: np.ndarray  # [N, k] int32, in no order
    logprobs: np.ndarray  # [N, k] float32


class InFlight(NamedTuple):
    """A block that is queued on the device."""

    choice: Choice
    result: mx.array  # [γ+2]
