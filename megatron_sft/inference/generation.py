"""Text from a model in whatever layout it stands: packed prefill, then one token a document and step from a cache.

1. answers that are wanted (a prompt, or several samples of it) are dealt in batches over data- and context-parallel ranks;
2. the prompts of a batch are prefilled in one packed row, then all its answers are decoded; those that ended leave it;
3. every rank returns every result.

Not here: the pass through the stages (forward.py), loading the model (load.py), reading prompts and writing answers (prompts.py).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_sft.config.options import GenerateConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import DataError
from megatron_sft.hf.weights import core_module
from megatron_sft.inference.forward import (
    dealt,
    evaluating,
    from_all_ranks,
    from_last_stage,
    idle,
    is_needed,
    last_logits,
    packed_row,
    require_known_tokens,
)
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks

OnToken = Callable[[int, int], bool]
"""(number of the answer, its new token) -> whether it ends there; called on every rank, with one answer on all."""
Forces = Callable[[list[int]], list[int]]
"""An answer so far -> tokens that are put behind it in the model's place, as a calculator's; mostly none."""
STOP_TOKENS = 8
"""A stop string is looked for in as many of the last tokens as it has bytes, and so many more."""


@dataclass(frozen=True)
class Generation:
    """What a model answered to one prompt."""

    tokens: list[int]
    """New tokens, without the end token, with those of a stop string."""
    finish_reason: str
    """stop: an end token or a stop string came; length: the limit of new tokens or of positions was reached; cut: on_token
    ended it."""
    logprobs: list[float] = field(default_factory=list)
    """Of each of the tokens, where asked for: natural logarithm of its probability, whatever temperature, top-k and top-p are."""
    stop: str = ""
    """The stop string that came."""


@dataclass
class _Answer:
    """One that is being generated."""

    number: int
    prompt: list[int]
    limit: int
    """New tokens at most."""
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    stop: str = ""
    forced: list[int] = field(default_factory=list)
    """Tokens that come next, whatever the model says."""


def sample(logits: torch.Tensor, options: GenerateConfig, draws: Sequence[float]) -> torch.Tensor:
    """Chooses a token of each row, with transformers' order: temperature, top-k, top-p.

    Args:
        logits: [rows, vocab] float32.
        options: temperature 0 takes the most likely token.
        draws: one number in [0, 1) a row, from the row's own generator.

    Returns:
        [rows] int64.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        ordered = ordered[:, : options.top_k]
    probabilities = ordered.double().softmax(-1)
    summed = probabilities.cumsum(-1)
    kept = torch.where(summed - probabilities < options.top_p, probabilities, 0.0).cumsum(-1)
    points = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * kept[:, -1:]
    chosen = torch.searchsorted(kept, points, right=True).clamp_max(kept.shape[1] - 1)
    return ids.gather(1, chosen)[:, 0]


def generate(
    chunks: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    options: GenerateConfig,
    end_token_ids: Collection[int],
    ranks: Ranks,
    max_positions: int | None = None,
    on_token: OnToken | None = None,
    decode: Callable[[list[int]], str] | None = None,
    forces: Forces | None = None,
) -> list[Generation]:
    """Continues prompts. Collective: all ranks call it with the same prompts, and all get all results.

    Args:
        chunks: this rank's model, in any layout; also in the middle of training (within train/optim.py:whole_parameters),
            whose random states it leaves alone.
        prompts: token ids, at least one each. A sample depends on the seed, its prompt's index and its own number alone.
        options: osl, temperature, top_k, top_p, seed, batch_size, num_samples, stop, logprobs.
        end_token_ids: each ends an answer.
        ranks: where this process stands.
        max_positions: prompt and answer together are at most that long; None: no limit.
        on_token: sees each token as it comes; every rank then generates every answer.
        decode: token ids -> text with all special tokens; needed for options.stop.
        forces: what it gives takes the place of the model's next tokens.

    Returns:
        num_samples answers a prompt, those of the first prompt first.

    Raises:
        DataError: a prompt is empty, leaves no position for an answer, or has a token that the model does not know.
    """
    assert decode is not None or not options.stop, "stop strings need decode"
    require_known_tokens(chunks, prompts)
    wanted = _answers(prompts, options, max_positions)
    size = options.batch_size
    mine = [wanted[first : first + size] for first in range(0, len(wanted), size)] if on_token else dealt(wanted, size)
    results: dict[int, Generation] = {}
    with evaluating(chunks):
        for number, batch in enumerate(mine, start=1):
            decoder = _Decoder(chunks, batch, options, ranks)
            while is_needed(bool(decoder.live), ranks):
                decoder.step()
                decoder.keep([_goes_on(answer, options, end_token_ids, on_token, decode) for answer in decoder.live])
                for answer in decoder.live if forces is not None else ():
                    answer.forced = answer.forced or forces(answer.tokens)  # type: ignore[misc]
            results |= {a.number: Generation(a.tokens, a.finish_reason, a.logprobs, a.stop) for a in batch}
            if on_token is None:
                logger.info("generated %d of %d answers", number * len(wanted) // len(mine), len(wanted))
    return from_all_ranks(results)


def answer_text(tokenizer: Any, answer: Generation) -> str:
    """The answer as text, without special tokens, up to its stop string."""
    text = str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
    return text.partition(answer.stop)[0] if answer.stop else text


def _answers(prompts: Sequence[Sequence[int]], options: GenerateConfig, max_positions: int | None) -> list[_Answer]:
    wanted: list[_Answer] = []
    for index, prompt in enumerate(prompts):
        if not prompt or (max_positions is not None and len(prompt) >= max_positions):
            raise DataError(
                f"prompt {index + 1} has {len(prompt)} tokens; expected 1 to {(max_positions or 0) - 1}. "
                "Shorten it, or leave it out."
            )
        limit = min(options.osl, (max_positions or 2**31) - len(prompt))
        for sample_number in range(options.num_samples):
            seed = [options.seed, index, sample_number] if sample_number else [options.seed, index]
            wanted.append(_Answer(len(wanted), list(prompt), limit, np.random.default_rng(seed)))
    return wanted


def _goes_on(
    answer: _Answer,
    options: GenerateConfig,
    end_token_ids: Collection[int],
    on_token: OnToken | None,
    decode: Callable[[list[int]], str] | None,
) -> bool:
    """Whether more tokens follow the one that came last; else `finish_reason` says why not."""
    token = answer.tokens[-1]
    if token in end_token_ids:
        del answer.tokens[-1], answer.logprobs[len(answer.tokens) :]
        answer.finish_reason = "stop"
    elif on_token is not None and on_token(answer.number, token):
        answer.finish_reason = "cut"
    elif decode is not None and options.stop and (stop := _stop_string(answer.tokens, options.stop, decode)):
        answer.finish_reason, answer.stop = "stop", stop
    elif len(answer.tokens) >= answer.limit:
        answer.finish_reason = "length"
    return not answer.finish_reason


def _stop_string(tokens: list[int], strings: Sequence[str], decode: Callable[[list[int]], str]) -> str:
    """The stop string that ends first among the last tokens, "" where there is none."""
    count = max(len(text.encode()) for text in strings) + STOP_TOKENS
    text = decode(tokens[-count:])
    ends = [(text.index(stop) + len(stop), stop) for stop in strings if stop in text]
    return min(ends)[1] if ends else ""


class _Decoder:
    """The answers of one batch with their cache.

    Args:
        chunks: as generate's.
        answers: of the batch; none on a rank that only keeps others company.
        options: how tokens are chosen.
        ranks: where this process stands.
    """

    def __init__(self, chunks: Sequence[Any], answers: Sequence[_Answer], options: GenerateConfig, ranks: Ranks):
        self._chunks, self._options, self._ranks = chunks, options, ranks
        self.live = list(answers)
        table = core_module(chunks[0]).rotary_table
        original = table.original_positions if table is not None else None
        self._first_long = None if original is None else original + 1  # longrope turns such documents with other frequencies
        if self.live:
            self._prefill()

    def _prefill(self) -> None:
        """The next row has all tokens of the live answers; what samples of a prompt share stands there once."""
        texts = [(*answer.prompt, *answer.tokens) for answer in self.live]
        once = list(dict.fromkeys(texts))
        self._row = packed_row(once, keeps=True)
        self._spread = [once.index(text) for text in texts] if len(once) < len(texts) else None

    @torch.no_grad()
    def step(self) -> None:
        """One pass, which gives each live answer one more token. Collective over ranks that share experts or stages."""
        if not self.live:
            idle(self._chunks)
            return
        options, target = self._options, device()
        logits = last_logits(self._chunks, *self._row)
        chosen = torch.empty(len(self.live), dtype=torch.int64, device=target)
        logprobs = torch.zeros(len(self.live), device=target)
        if logits is not None:
            logits = logits if self._spread is None else logits[self._spread]
            chosen = sample(logits, options, [answer.random.random() if options.temperature else 0.0 for answer in self.live])
            if options.logprobs:
                logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        tokens = from_last_stage(chosen).tolist()
        values = from_last_stage(logprobs).tolist() if options.logprobs else []
        for place, answer in enumerate(self.live):
            answer.tokens.append(answer.forced.pop(0) if answer.forced else tokens[place])
            answer.logprobs += values[place : place + 1]

    def keep(self, stays: Sequence[bool]) -> None:
        """Makes the next row, of the live answers that stay."""
        places = [place for place, stay in enumerate(stays) if stay]
        is_all = len(places) == len(self.live)
        self.live = [self.live[place] for place in places]
        if not self.live:
            return
        lengths = [len(answer.prompt) + len(answer.tokens) for answer in self.live]
        if self._first_long in lengths:
            self._prefill()
            return
        params = self._row[2]
        params.advance(max(lengths))
        if self._spread is not None or not is_all:
            rows = places if self._spread is None else [self._spread[place] for place in places]
            params.keep(torch.tensor(rows, device=device()))
            self._spread = None
        tokens = torch.tensor([[answer.tokens[-1] for answer in self.live]], device=device())
        self._row = tokens, params.lengths[None], params
