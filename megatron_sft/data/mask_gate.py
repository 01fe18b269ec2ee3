"""The gate before a build: on real rows, template, tokens and masks fit together. Fails closed.

1. the template renders within limits of time and memory, in a process of its own;
2. the tokens are those of tokenizer.apply_chat_template (not where --special-in-content text makes others of them);
3. each trained stretch ends with the end-of-turn token, which is trained whatever the pad token is;
4. nothing before the first assistant message is trained.

A bad row is no fault of the template: the build, which sees every row, counts and reports it.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

from megatron_sft.data.chat import FAILS, ChatEncoder, Encoded, Rendered, for_template
from megatron_sft.data.fast_bpe import NoPlaces
from megatron_sft.data.limits import num_characters
from megatron_sft.data.schema import Row, RowError
from megatron_sft.data.trial import TimeIsUp, TrialError, clock, limited, row_seconds
from megatron_sft.errors import ConfigError, DataError

CHECKED_ROWS = 32
MOST_RUNAWAYS = 3
"""So many rows with which the template runs away, and none with which it does not, are enough."""
GATE_S = 30.0
"""Of processor time, after which no further row is looked at."""
NOT_TRIED, ANSWERED, FAILED, RAN_AWAY = range(4)


def check_masks(encoder: ChatEncoder, rows: Iterable[Row]) -> Counter[str]:
    """Looks at the first CHECKED_ROWS rows of one source.

    Returns:
        Samples by the route of spans.py that decided them.

    Raises:
        ConfigError: the template fails or runs away on each of them.
        DataError: a row for which one of the four does not hold.
    """
    sample = [row for row in itertools.islice(rows, CHECKED_ROWS) if row.text is None]
    outcomes = RawArray("b", len(sample))  # shared: a process that a row ended cannot say which
    routes: Counter[str] = Counter()
    fault = ""
    is_done = not sample
    while not is_done:
        try:
            routes, fault = limited(lambda: _check_rows(encoder, sample, outcomes), None)
            is_done = True
        except TrialError as error:
            fault = f"the chat template {error}"
            outcomes[outcomes[:].index(NOT_TRIED)] = RAN_AWAY
            is_done = NOT_TRIED not in outcomes[:] or _is_hopeless(outcomes)
    if fault and ANSWERED not in outcomes[:]:
        raise ConfigError([f"{encoder.config.tokenizer_model}: {fault}. Correct it, or pass --chat-template."])
    return routes


def _is_hopeless(outcomes: Any) -> bool:
    return ANSWERED not in outcomes[:] and outcomes[:].count(RAN_AWAY) >= MOST_RUNAWAYS


def _check_rows(encoder: ChatEncoder, rows: Sequence[Row], outcomes: Any) -> tuple[Counter[str], str]:
    """(samples by route, what is wrong with the template, if anything) of the rows that were not tried before."""
    encoder.routes.clear()
    fault, start = "", time.process_time()
    for index, row in enumerate(rows):
        if outcomes[index] != NOT_TRIED or _is_hopeless(outcomes) or time.process_time() - start > GATE_S:
            continue
        outcome = ANSWERED
        try:
            with clock(row_seconds(num_characters(row.messages)), is_expendable=True):
                _check_row(encoder, row)
        except NoPlaces:
            pass
        except RowError as error:
            if error.reason == FAILS:
                outcome, fault = FAILED, error.detail.split(". Expected")[0]
        except TimeIsUp:
            outcome, fault = RAN_AWAY, "the chat template takes too long"
        outcomes[index] = outcome
    return encoder.routes, fault


def _check_row(encoder: ChatEncoder, row: Row) -> None:
    for messages, last in encoder.samples(row):
        rendered = encoder.render_sample(messages, row, last)
        encoded = encoder.encode_text(rendered)
        said = [for_template(m) for m in messages]
        expected = encoder.tokenizer.apply_chat_template(
            said, tools=row.tools, tokenize=True, return_dict=False, **encoder.template_kwargs(messages, row)
        )
        if rendered.authors is None and list(expected) != encoded.tokens.tolist():
            raise DataError(
                f"{row.where}: our tokens are not those of tokenizer.apply_chat_template ({len(encoded.tokens)} against "
                f"{len(expected)}). Expected the same; report the template. Text: {rendered.text[:200]!r}"
            )
        if rendered.route != "all":
            _check_spans(encoder, rendered, encoded, row.where)


def _check_spans(encoder: ChatEncoder, rendered: Rendered, encoded: Encoded, where: str) -> None:
    outside = np.ones(len(encoded.tokens), dtype=bool)
    tokens = encoder.tokens_of(rendered)
    for first, end, _ in rendered.spans:
        inside = np.flatnonzero((tokens.starts >= first) & (tokens.ends <= end) & (tokens.ends > tokens.starts))
        outside[inside] = False
        if first < end and not (len(inside) and encoded.loss_mask[inside[-1]] and tokens.ends[inside[-1]] == end):
            raise DataError(
                f"{where}: the end of the answer {rendered.text[first:end][-40:]!r} is not trained, so that the model "
                "would never stop. Expected a token of its own for it; report the template and the tokenizer."
            )
    if encoded.loss_mask[outside].any():
        raise DataError(f"{where}: a token outside the assistant's messages is trained; expected none. Report the template.")
