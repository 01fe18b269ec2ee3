import json
import logging

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sft.data.fast_bpe import HARD_TEXTS, BPEText, HFText, text_tokenizer

QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
CORPUS = [*HARD_TEXTS, "the quick brown fox jumps over the lazy dog", "\u4f60\u597d world 2024 caf\u00e9"] * 20
SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>"]


def tokenizer_of(split, normalizer=None, **added):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, **added) for text in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_texts(count):
    random = np.random.default_rng(0)
    alphabet = [
        *"abcXYZ019  \n\n\t'.,!<|>_",
        "'ll",
        "caf\u00e9",
        "e\u0301",
        "\u4f60",
        "\U0001f600",
        "\u00a0",
        *SPECIALS,
    ]
    return ["".join(random.choice(alphabet, size=random.integers(0, 60))) for _ in range(count)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_ids_and_offsets_equal_the_hugging_face_tokenizer(split, normalizer):
    tokenizer = tokenizer_of(split, normalizer)
    fast, slow = text_tokenizer(tokenizer), HFText(tokenizer)
    assert isinstance(fast, BPEText)
    for text in random_texts(2000):
        for ours, theirs in zip(fast(text), slow(text), strict=True):
            assert ours.dtype == theirs.dtype and ours.tolist() == theirs.tolist(), text


def test_a_text_with_a_byte_that_the_vocabulary_lacks_goes_the_slow_way():
    tokenizer = tokenizer_of("digits")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    lost = {"\u00f0", "\u00f1", "\u00ef"}  # GPT-2's stand-ins for bytes that begin rare characters
    kept = [token for token in model["vocab"] if not lost & set(token)]
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in kept]
    for i, token in enumerate(description["added_tokens"]):
        token["id"] = len(kept) + i
    smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    fast, slow = text_tokenizer(smaller), HFText(smaller)
    assert isinstance(fast, BPEText)
    for text in ["a \U0001f600 b", *random_texts(100)]:
        assert fast(text).ids.tolist() == slow(text).ids.tolist()


def test_a_text_that_tiktoken_cannot_split_goes_the_slow_way():
    tokenizer = tokenizer_of("qwen")
    text = " " * 400_000 + "a"
    for ours, theirs in zip(text_tokenizer(tokenizer)(text), HFText(tokenizer)(text), strict=True):
        assert np.array_equal(ours, theirs)


def test_offsets_of_a_character_cut_into_bytes():
    tokens = text_tokenizer(tokenizer_of("gpt2"))("h\u00eb")
    assert (tokens.starts.tolist(), tokens.ends.tolist()) == ([0, 1, 1], [1, 2, 2])


@pytest.fixture
def log_lines():
    """Messages of the library's logger, whatever its level and handlers are."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_sft")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


def refused(tokenizer, log_lines, samples=()):
    assert isinstance(text_tokenizer(tokenizer, samples), HFText)
    (line,) = log_lines
    return line


def test_another_normalizer_falls_back_with_one_line(log_lines):
    message = refused(tokenizer_of("gpt2", normalizers.NFKC()), log_lines)
    assert message == "fast tokeniser: not used, the tokenizer normalises text with NFKC"


def test_greedy_added_tokens_fall_back(log_lines):
    message = refused(tokenizer_of("gpt2", rstrip=True), log_lines)
    assert message == "fast tokeniser: not used, the added token '<|im_start|>' takes in neighbouring text"


def test_a_tokenizer_that_is_no_bpe_falls_back(log_lines):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert refused(tokenizer, log_lines) == "fast tokeniser: not used, the tokenizer is WordLevel, not byte-level BPE"


def test_a_difference_on_the_samples_falls_back(log_lines):
    tokenizer = tokenizer_of("gpt2")
    tokenizer.backend_tokenizer.enable_truncation(5)
    message = refused(tokenizer, log_lines)
    assert message.startswith("fast tokeniser: not used, Hugging Face gives other tokens for")
