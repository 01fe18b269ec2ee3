"""Generation against transformers, cache against no cache, and the choice of tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig
from megatron_sft.core_compat import install_cpu_mode
from tests.text_models import byte_tokenizer, greedy, text_model

install_cpu_mode()

from megatron_sft import parallel  # noqa: E402
from megatron_sft.errors import ConfigError, DataError  # noqa: E402
from megatron_sft.inference import prompts  # noqa: E402
from megatron_sft.inference.forward import last_logits, packed_row  # noqa: E402
from megatron_sft.inference.generation import answer_text, generate, sample  # noqa: E402
from megatron_sft.inference.load import Inference, load_for_inference  # noqa: E402
from megatron_sft.model.attention import packed_seq_params  # noqa: E402

PROMPTS = [[1, 2, 3, 4, 5], [60, 61], [9, 8, 7, 6, 5, 4, 3, 2, 1], [100], [33, 44, 55]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    reference = text_model(request.param, folder)
    run = RunConfig(checkpoint=CheckpointConfig(load=str(folder)), data=DataConfig(tokenizer_model=str(folder)))
    loaded = load_for_inference(run, frozenset())
    yield loaded, reference
    parallel.finalize()


def test_greedy_tokens_equal_transformers(models: tuple[Inference, Any]) -> None:
    loaded, reference = models
    expected = [greedy(reference, prompt, 20, []) for prompt in PROMPTS]
    for batch_size in (1, 2, 8):
        options = GenerateConfig(osl=20, batch_size=batch_size)
        answers = generate(loaded.chunks, PROMPTS, options, (), loaded.ranks)
        assert [answer.tokens for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"length"}


def test_stops_at_any_end_token_and_keeps_the_others_going(models: tuple[Inference, Any]) -> None:
    loaded, reference = models
    ends = [greedy(reference, PROMPTS[0], 20, [])[3], greedy(reference, PROMPTS[1], 20, [])[5]]
    answers = generate(loaded.chunks, PROMPTS, GenerateConfig(osl=20), ends, loaded.ranks)
    assert [answer.tokens for answer in answers] == [greedy(reference, prompt, 20, ends) for prompt in PROMPTS]
    assert answers[0].finish_reason == "stop" and len(answers[0].tokens) <= 3


def test_logits_with_cache_equal_logits_without(models: tuple[Inference, Any]) -> None:
    chunks = models[0].chunks
    sequences = [prompt + prompt for prompt in PROMPTS]
    tokens, positions, whole = packed_row(sequences, keeps=False)
    with torch.no_grad():
        expected = chunks[0](tokens, positions, packed_seq_params=packed_seq_params(whole.cu_seqlens_q, 18))[0]
        row, at, params = packed_row([s[:1] for s in sequences], keeps=True)
        for step in range(1, 3):
            logits = last_logits(chunks, row, at, params)
            assert logits is not None
            rows = whole.cu_seqlens_q[:-1].long() + step - 1
            torch.testing.assert_close(logits, expected[rows], atol=2e-5, rtol=0)
            params.advance(step + 1)
            row, at = torch.tensor([[s[min(step, len(s) - 1)] for s in sequences]]), params.lengths[None]


def test_the_cache_grows(models: tuple[Inference, Any]) -> None:
    loaded, reference = models
    (answer,) = generate(loaded.chunks, PROMPTS[:1], GenerateConfig(osl=200), (), loaded.ranks)
    assert answer.tokens == greedy(reference, PROMPTS[0], 200, [])


def test_log_probabilities_are_those_of_the_model(models: tuple[Inference, Any]) -> None:
    """Whatever temperature and top-k the tokens were drawn with."""
    loaded, reference = models
    options = GenerateConfig(osl=9, logprobs=True, temperature=0.7, top_k=40)
    for prompt, answer in zip(PROMPTS, generate(loaded.chunks, PROMPTS, options, (), loaded.ranks), strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    ends = [greedy(reference, PROMPTS[0], 20, [])[3]]
    for answer in generate(loaded.chunks, PROMPTS, GenerateConfig(osl=20, logprobs=True), ends, loaded.ranks):
        assert len(answer.logprobs) == len(answer.tokens)


def test_samples_of_a_prompt_differ_and_the_first_is_the_one_alone(models: tuple[Inference, Any]) -> None:
    loaded = models[0]
    options = GenerateConfig(osl=12, temperature=1.5, seed=7)
    alone = generate(loaded.chunks, PROMPTS, options, (), loaded.ranks)
    options = dataclasses.replace(options, num_samples=3)
    runs = [generate(loaded.chunks, PROMPTS, dataclasses.replace(options, batch_size=n), (), loaded.ranks) for n in (1, 4, 16)]
    assert runs[0] == runs[1] == runs[2] and runs[0][::3] == alone
    assert len({tuple(answer.tokens) for answer in runs[0]}) == 15


def test_a_stop_string_ends_an_answer_inside_and_across_tokens(models: tuple[Inference, Any]) -> None:
    loaded = models[0]
    free = generate(loaded.chunks, PROMPTS, GenerateConfig(osl=20), (), loaded.ranks)
    texts = [loaded.decode(answer.tokens) for answer in free]
    stop = texts[0][5:8]
    options = GenerateConfig(osl=20, stop=(stop, "never comes"))
    answers = generate(loaded.chunks, PROMPTS, options, (), loaded.ranks, decode=loaded.decode)
    for text, whole, answer in zip(texts, free, answers, strict=True):
        assert answer.finish_reason == ("stop" if stop in text else "length")
        assert answer.tokens == whole.tokens[: len(answer.tokens)]
        assert stop not in loaded.decode(answer.tokens[:-1]) and loaded.decode(answer.tokens).count(stop) == (stop in text)
        assert (
            answer_text(loaded.tokenizer, answer)
            == loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True).partition(stop)[0]
        )
    assert answers[0].stop == stop


def test_tokens_are_seen_as_they_come_and_may_end_the_answer(models: tuple[Inference, Any]) -> None:
    loaded, reference = models
    seen: list[tuple[int, int]] = []

    def on_token(number: int, token: int) -> bool:
        seen.append((number, token))
        return number == 1 and sum(other == 1 for other, _ in seen) == 3

    answers = generate(loaded.chunks, PROMPTS[:2], GenerateConfig(osl=5), (), loaded.ranks, on_token=on_token)
    expected = [greedy(reference, PROMPTS[0], 5, []), greedy(reference, PROMPTS[1], 3, [])]
    assert [answer.tokens for answer in answers] == expected
    assert [answer.finish_reason for answer in answers] == ["length", "cut"]
    assert [[token for other, token in seen if other == number] for number in range(2)] == expected


def test_a_prompts_sample_does_not_depend_on_its_batch_mates(models: tuple[Inference, Any]) -> None:
    loaded = models[0]
    options = GenerateConfig(osl=12, temperature=1.5, top_k=50, top_p=0.95, seed=7)
    runs = [generate(loaded.chunks, PROMPTS, dataclasses.replace(options, batch_size=n), (), loaded.ranks) for n in (1, 3, 8)]
    assert runs[0] == runs[1] == runs[2]
    other = generate(loaded.chunks, PROMPTS, dataclasses.replace(options, seed=8), (), loaded.ranks)
    assert other != runs[0]


def test_answer_ends_at_the_last_position(models: tuple[Inference, Any]) -> None:
    loaded = models[0]
    answers = generate(loaded.chunks, PROMPTS, GenerateConfig(osl=20), (), loaded.ranks, max_positions=12)
    assert [len(answer.tokens) for answer in answers] == [7, 10, 3, 11, 9]
    with pytest.raises(DataError, match="prompt 3 has 9 tokens; expected 1 to 8"):
        generate(loaded.chunks, PROMPTS, GenerateConfig(osl=20), (), loaded.ranks, max_positions=9)


def test_sample_frequencies_follow_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    rows = logits.expand(1000, -1)

    def shares(**options: Any) -> list[float]:
        return (torch.bincount(sample(rows, GenerateConfig(**options), draws), minlength=4) / 1000).tolist()

    for temperature in (0.5, 1.0, 2.0):
        assert shares(temperature=temperature) == pytest.approx((logits[0] / temperature).softmax(-1).tolist(), abs=1.1e-3)
    two = logits[0, 1:3].softmax(-1).tolist()
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0, two[0], two[1], 0], abs=1.1e-3)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0, two[0], two[1], 0], abs=1.1e-3)
    assert shares(temperature=1.0, top_p=0.5) == [0, 1, 0, 0]
    assert shares(temperature=0.0) == [0, 1, 0, 0]


def test_prompts_of_text_and_jsonl_and_command_line(tmp_path: Path) -> None:
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\ntwo\r\n")
    rows.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"prompt": "c"}\n{"question": "d"}\n'
    )
    read = prompts.read_prompts(GenerateConfig(prompts_path=str(text)), DataConfig())
    assert [(p.messages[0]["content"], p.where) for p in read] == [("one", f"{text}:1"), ("two", f"{text}:3")]
    read = prompts.read_prompts(GenerateConfig(prompts_path=str(rows)), DataConfig())
    assert [p.messages for p in read] == [[{"role": "user", "content": letter}] for letter in "acd"]
    read = prompts.read_prompts(GenerateConfig(prompts_path=str(rows), fraction=0.5), DataConfig())
    assert [p.where for p in read] == [f"{rows}:1", f"{rows}:2"]
    read = prompts.read_prompts(GenerateConfig(prompt=("x", "y")), DataConfig())
    assert [p.messages[0]["content"] for p in read] == ["x", "y"]


def test_bad_prompts_name_file_and_line(tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    for line, message in (
        ("{broken", ":2:"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', ":2: no message before the assistant's"),
        ('{"answer": "b"}', ":2: no prompt among the columns .*answer"),
        ('{"messages": "b"}', ":2: column messages is text; expected a list of messages"),
    ):
        rows.write_text('{"prompt": "c"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            prompts.read_prompts(GenerateConfig(prompts_path=str(rows)), DataConfig())


def test_end_tokens_are_the_tokenizers_the_folders_and_the_templates(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert prompts.end_token_ids(tokenizer, tmp_path) == {257, 259}
    assert prompts.end_token_ids(tokenizer, tmp_path, use_template=False) == {257}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert prompts.end_token_ids(tokenizer, tmp_path) == {5, 6, 257, 259}


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        prompts.check_options(GenerateConfig(osl=0, top_p=0.0, fraction=2.0, stop=("",)))
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("", {"content": "a\ud800"}, "the text has a lone surrogate at character"),
        ("{{ 1 // 0 }}", {}, "the chat template refuses the messages"),
        ("{% for i in range(10**9) %}{% endfor %}", {}, "the chat template refuses the messages"),
        ("", {"tools": [{"name": "weather"}]}, "the chat template leaves out the tool weather; expected every tool"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(template: str, prompt: dict[str, Any], message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template + tokenizer.chat_template
    asked = prompts.Prompt([{"role": "user", "content": prompt.get("content", "a")}], "p.jsonl:3", prompt.get("tools"))
    with pytest.raises(DataError, match=rf"p\.jsonl:3: {message}"):
        prompts.encode_prompts(tokenizer, [asked], True)


def test_tokens_that_the_model_does_not_know_are_refused(models: tuple[Inference, Any]) -> None:
    loaded, _ = models
    unknown = loaded.model.vocab_size
    with pytest.raises(DataError, match=rf"token id {unknown}, but the model's vocabulary ends at {unknown - 1}; expected"):
        generate(loaded.chunks, [[1, 2], [3, unknown]], GenerateConfig(osl=1), [], loaded.ranks)


def test_text_prompts_are_utf8_with_or_without_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    read = prompts.read_prompts(GenerateConfig(prompts_path=str(tmp_path / "p.txt")), DataConfig())
    assert [prompt.messages[0]["content"] for prompt in read] == ["one", "two"]
    (tmp_path / "latin").write_bytes(b"a\xff\n")
    with (tmp_path / "latin").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(DataError, match="standard input: not UTF-8 text"):
            prompts.read_prompts(GenerateConfig(), DataConfig())
    same = GenerateConfig(prompts_path=str(tmp_path / "p.txt"), output=str(tmp_path / "." / "p.txt"))
    with pytest.raises(ConfigError, match="is --prompts-path too, which it would replace; expected another file"):
        prompts.check_options(same)


def test_a_tokenizer_without_template_asks_for_no_chat_template() -> None:
    tokenizer = byte_tokenizer()
    prompt = prompts.Prompt([{"role": "user", "content": "ab"}], "p.txt:1")
    ids = prompts.encode_prompts(tokenizer, [prompt], True)[0]
    assert tokenizer.decode(ids) == "<|start|>user\nab<|end|>\n<|start|>assistant\n"
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="--no-chat-template"):
        prompts.encode_prompts(tokenizer, [prompt], True)
    assert tokenizer.decode(prompts.encode_prompts(tokenizer, [prompt], False)[0]) == "ab"
