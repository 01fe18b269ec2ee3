"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) with a model of ours: its tasks, scores and files.

megatron-sft lm-eval MODEL --tasks arc_easy hellaswag --num_fewshot 5 --output_path scores

1. rank 0 runs its command line, whose `--model` is this module's class; that loads MODEL once the tasks are known;
2. what it asks of the model goes, as token ids, to all ranks, which answer together in the layout that the model stands in;
3. it scores, prints and writes, on rank 0.

Not here: how answers are had (answers.py, inference/generation.py), our own tasks (evaluation.py).
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megatron_sft import parallel
from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import RunConfig
from megatron_sft.errors import ConfigError
from megatron_sft.inference.generation import Generation, generate
from megatron_sft.inference.load import Inference, load_for_inference
from megatron_sft.inference.prompts import end_token_ids
from megatron_sft.tasks.answers import ROW_TOKENS, greedy_likelihoods, log_likelihoods

T = TypeVar("T")
NAME = "megatron-sft"
"""Of our class in lm-evaluation-harness."""
BATCH_SIZE = 8
"""Where --batch_size is left out, which cannot be told from 1, or auto."""
DRAWN = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
"""Of a task's generation_kwargs -> GenerateConfig."""


class Calls:
    """What rank 0 is asked reaches all ranks, which do it together. The others wait meanwhile, however long rank 0 scores.

    Args:
        load: the model. Collective.
    """

    def __init__(self, load: Callable[[], Inference]):
        self.loaded, self._count = load(), 0

    def all_do(self, action: Callable[[Inference], T]) -> T:
        """On rank 0: its result, which every rank has computed."""
        self._next(True)
        return parallel.gather(action)[0](self.loaded)

    def follow(self) -> None:
        """On the other ranks: does what rank 0 is asked, until it ends."""
        while self._next(False):
            parallel.gather(None)[0](self.loaded)  # type: ignore[misc]  # rank 0's is no None

    def end(self) -> None:
        """On rank 0: the others go."""
        self._next(False)

    def _next(self, goes_on: bool) -> bool:
        self._count += 1
        return parallel.from_first(f"lm-eval/{self._count}", lambda: goes_on)


class Asked:
    """The methods of lm-evaluation-harness's TemplateLM (lm_eval/api/model.py), of which `_registered` makes a subclass.

    Args:
        calls: to all ranks.
        batch_size: of --batch_size.
    """

    calls: Calls

    def __init__(self, calls: Calls, batch_size: int):
        super().__init__()
        self.calls, self.tokenizer, self._batch_size, self._is_chat = calls, calls.loaded.tokenizer, batch_size, False

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in ids if token is not None)

    @property
    def max_length(self) -> int:
        return self.calls.loaded.model.max_position_embeddings or 2048

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; their last one goes on where no new turn is asked for."""
        self._is_chat = True
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the first token, as a chat template writes it, gets no second one."""
        begins = string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        adds = not begins if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=adds)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """Of (texts, token ids before, those that are asked about): logarithm of the probability, and whether greedy says so."""
        sequences = [[*before, *then][-self.max_length - 1 :] for _, before, then in requests]
        counts = [min(len(then), len(ids) - 1) for (_, _, then), ids in zip(requests, sequences, strict=True)]
        return self.calls.all_do(functools.partial(_likelihoods, sequences, counts, self._batch_size))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; windows that are as long as the model reads, each token once (lm_eval/utils.py)."""
        windows: list[list[int]] = []
        counts: list[int] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window, count in rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length):
                windows.append(window)
                counts.append(count)
                owners.append(number)
        batch_size = max(1, self._batch_size * ROW_TOKENS // max(map(len, windows), default=1))
        values = self.calls.all_do(functools.partial(_sums, windows, counts, batch_size)) if windows else []
        sums = [0.0] * len(requests)
        for owner, value in zip(owners, values, strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on after (text, generation_kwargs), each up to one of its stop strings."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            options = generation_options(requests[numbers[0]].args[1], self._batch_size)
            room = max(self.max_length - options.osl, self.max_length // 2)
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            continued = self.calls.all_do(functools.partial(_continued, prompts, options, self._is_chat))
            for number, answer in zip(numbers, continued, strict=True):
                text = str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
                for stop in options.stop:
                    text = text.partition(stop)[0]
                answers[number] = text
        return answers


def _likelihoods(
    sequences: Sequence[Sequence[int]], counts: Sequence[int], size: int, loaded: Inference
) -> list[tuple[float, bool]]:
    return greedy_likelihoods(loaded.chunks, sequences, counts, size)


def _sums(sequences: Sequence[Sequence[int]], counts: Sequence[int], size: int, loaded: Inference) -> list[float]:
    return log_likelihoods(loaded.chunks, sequences, counts, size)


def _continued(prompts: Sequence[list[int]], options: GenerateConfig, is_chat: bool, loaded: Inference) -> list[Generation]:
    ends = end_token_ids(loaded.tokenizer, loaded.tokenizer_folder, is_chat)
    limit = loaded.model.max_position_embeddings or None
    return generate(loaded.chunks, prompts, options, ends, loaded.ranks, limit, decode=loaded.decode)


def rolling_windows(tokens: Sequence[int], first: int, size: int) -> Iterator[tuple[list[int], int]]:
    """(token ids, how many of the last are asked about) of each window; the last one is whole and asks about the rest.

    Example: tokens 0 to 9, first 99, size 4 -> ([99, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)
    """
    ids = [first, *tokens]
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        yield ids[max(0, end - size - 1) : end], end - start


def generation_options(said: Mapping[str, Any], batch_size: int) -> GenerateConfig:
    """generation_kwargs of a task or of --gen_kwargs.

    Raises:
        ConfigError: one that is not known here.
    """
    left = dict(said)
    until = left.pop("until", None) or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    lengths = [left.pop(name) for name in names if left.get(name) is not None]
    drawn = {ours: left.pop(theirs) for theirs, ours in DRAWN.items() if left.get(theirs) is not None}
    if not left.pop("do_sample", bool(drawn.get("temperature"))):
        drawn = {}
    elif not drawn.get("temperature"):
        drawn["temperature"] = 1.0
    if unknown := [name for name, value in left.items() if value is not None and name not in names]:
        known = ", ".join(["until", *names, "do_sample", *DRAWN])
        raise ConfigError([f"generation_kwargs: {', '.join(unknown)} not known; expected {known}. Leave it out of --gen_kwargs."])
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return GenerateConfig(osl=int(lengths[0]) if lengths else 256, batch_size=batch_size, stop=stop, **drawn)


def _registered(load: Callable[[], Calls]) -> None:
    """Makes our class known to lm-evaluation-harness as NAME; `load` is called when a model is wanted."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    def create(cls: Any, arguments: Mapping[str, Any], also: Mapping[str, Any] | None = None) -> Any:
        if unknown := sorted(set(arguments) - {"trust_remote_code"}):
            raise ConfigError([f"--model_args {' '.join(unknown)}: the model is the one before the flags. Leave it out."])
        size = str((also or {}).get("batch_size") or "auto")
        return cls(load(), int(size) if size.isdecimal() and size not in ("0", "1") else BATCH_SIZE)

    register_model(NAME)(type("MegatronSFT", (Asked, TemplateLM), {"create_from_arg_obj": classmethod(create)}))


def require_harness() -> None:
    """Raises ConfigError where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        missing = f"lm-eval: lm-evaluation-harness cannot be imported ({error}); expected its package lm_eval"
        raise ConfigError([f"{missing}. Run: pip install 'megatron-sft[eval]'"]) from None


def ask_harness(run: RunConfig, explicit: frozenset[str], words: Sequence[str]) -> int:
    """Everything that `megatron-sft lm-eval` does. Collective.

    Args:
        run: as our flags say it.
        explicit: ModelConfig fields that a flag set.
        words: lm-evaluation-harness's own, of `lm-eval run`.

    Returns:
        The exit status.

    Raises:
        ConfigError: it refuses the words, or the tasks are not there.
    """
    require_harness()
    made: list[Calls] = []

    def load() -> Calls:
        made.append(Calls(lambda: load_for_inference(run, explicit)))
        return made[0]

    if parallel.process_environment()[0] != 0:
        load().follow()
    else:
        _registered(load)
        before, sys.argv = sys.argv, ["lm-eval", "run", "--model", NAME, *words]
        try:
            _run_harness()
        except ValueError as error:
            if made:
                raise
            said = f"lm-evaluation-harness refuses the command line ({error})"
            raise ConfigError([f"lm-eval: {said}; expected what it knows. See: lm-eval run --help, lm-eval ls tasks"]) from None
        finally:
            sys.argv = before
            if made:
                made[0].end()
    parallel.finalize()
    return 0


def _run_harness() -> None:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SystemExit as error:  # argparse has said why
        if error.code not in (None, 0):
            found = "lm-eval: lm-evaluation-harness refuses its flags, as it says above"
            raise ConfigError([f"{found}; expected those of lm-eval run --help. Correct them."]) from None
