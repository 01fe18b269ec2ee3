"""A bare sentencepiece model and tokenizers written in Python: the same ids as Hugging Face's, exact character places."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import PythonBackend

from megatron_sft.config.run import DataConfig
from megatron_sft.data.chat import ChatEncoder, load_tokenizer
from megatron_sft.data.mask_gate import check_masks
from megatron_sft.data.schema import Row, RowError
from megatron_sft.data.tokenizer import SlowText
from megatron_sft.errors import ConfigError
from tests.text_models import byte_tokenizer

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "Hello, how are you?",
    "I am fine, thank you.",
    "The quick brown fox",
    "[INST] what [/INST]",
    "Gr\u00fc\u00dfe aus K\u00f6ln",
    "user assistant",
]
CHAT = [
    {"role": "user", "content": "Hello \u4f60 ?"},
    {"role": "assistant", "content": "fine \u4f60\u597d, thank  you"},
    {"role": "user", "content": "Gr\u00fc\u00dfe"},
    {"role": "assistant", "content": "quick fox"},
]


@pytest.fixture(params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Path of a sentencepiece model of 340 pieces; it keeps white space as it is, as Llama's does."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type=request.param,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        num_threads=1,
    )
    return str(tmp_path / "tokenizer.model")


def encoder(model: str, template: str) -> ChatEncoder:
    config = DataConfig(tokenizer_model=model, chat_template=template)
    return ChatEncoder(load_tokenizer(config), config)


def test_ids_are_those_of_sentencepiece(model: str) -> None:
    tokenizer = load_tokenizer(DataConfig(tokenizer_model=model))
    own = sentencepiece.SentencePieceProcessor(model_file=model)
    for text in [*LINES, "\u4f60\u597d  two spaces\nline", " x "]:
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
        assert SlowText(tokenizer)(text).ids.tolist() == own.encode(text)


@pytest.mark.parametrize(("template", "end"), [(INST, "</s>"), (CHATML, "<|im_end|>")])
def test_masks_are_exact_without_a_fast_tokenizer(model: str, template: str, end: str) -> None:
    chat_encoder = encoder(model, template)
    (encoded,) = chat_encoder.encode(Row(CHAT, where="a:1"))
    places = chat_encoder.tokenise(chat_encoder.tokenizer.apply_chat_template(CHAT, tokenize=False))
    text = chat_encoder.tokenizer.apply_chat_template(CHAT, tokenize=False)
    for message in CHAT:
        first = text.index(message["content"])
        last = first + len(message["content"]) + (len(end) if message["role"] == "assistant" else 0)
        inside = (places.starts >= first) & (places.ends <= last)
        assert inside.sum() >= 2
        assert set(encoded.loss_mask[inside].tolist()) == {int(message["role"] == "assistant")}
    pieces = [chat_encoder.tokenizer.convert_ids_to_tokens(int(token)) for token in encoded.tokens]
    assert [int(on) for piece, on in zip(pieces, encoded.loss_mask, strict=True) if piece == end].count(1) == 2
    assert [places.starts[0], places.ends[-1]] == [0, len(text)]


def test_the_gate_passes_a_bare_model(model: str) -> None:
    assert check_masks(encoder(model, INST), [Row(CHAT, where="a:1")] * 3) == {"prefix": 3}


def test_a_bare_model_needs_a_template(model: str) -> None:
    config = DataConfig(tokenizer_model=model)
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatEncoder(load_tokenizer(config), config)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05abc"])
def test_a_damaged_model_is_a_config_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected|Expected"):
        load_tokenizer(DataConfig(tokenizer_model=str(tmp_path / "tokenizer.model")))


def test_a_template_file_that_is_missing_is_a_config_error(model: str) -> None:
    with pytest.raises(ConfigError, match=r"--chat-template /nowhere.jinja: .*No such file"):
        load_tokenizer(DataConfig(tokenizer_model=model, chat_template="/nowhere.jinja"))


class Letters(PythonBackend):
    """A tokenizer in Python: one token a character, as its subclass may spoil."""

    lowers = False

    def __init__(self, **kwargs: object):
        self._letters = [chr(i) for i in range(32, 127)] + ["\n"]
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self._letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text.lower() if self.lowers else text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_in_python_is_exact_or_refused() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = INST
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    config = DataConfig(tokenizer_model="m")
    (encoded,) = ChatEncoder(tokenizer, config).encode(Row(chat, where="a:1"))
    assert len(encoded.tokens) == len("[INST] Hi [/INST] Yes") + 2
    assert encoded.loss_mask.tolist() == [0] * 18 + [1] * 5
    tokenizer.lowers = True
    with pytest.raises(RowError, match="a:1: the tokenizer gives no character places"):
        ChatEncoder(tokenizer, config).encode(Row(chat, where="a:1"))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"eos_token_id": "x"}, "Validation error for field 'eos_token_id': +TypeError: Field 'eos_token_id' with value 'x'"),
        ({"dtype": "float99"}, "module 'torch' has no attribute 'float99'"),
        ({"head_dim": 7}, "Class validation error for validator 'validate_rope': +ValueError: RoPE requires an even"),
    ],
)
def test_a_config_json_that_transformers_refuses_is_a_config_error(wrong: dict[str, object], reason: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # its class is then config.json's
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **wrong}))
    with pytest.raises(ConfigError, match=rf"--tokenizer-model \S+: {reason}.* Expected an HF folder"):
        load_tokenizer(DataConfig(tokenizer_model=str(tmp_path)))


def test_truncation_and_padding_of_a_training_before_do_not_count(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=300)
    tokenizer.save_pretrained(tmp_path)
    assert {"max_length": 5}.items() <= json.loads((tmp_path / "tokenizer.json").read_text())["truncation"].items()
    encoder = ChatEncoder(load_tokenizer(DataConfig(tokenizer_model=str(tmp_path))), DataConfig())
    row = Row([{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}], where="a:1")
    (encoded,) = encoder.encode(row)
    assert encoder.tokenizer.decode(encoded.tokens) == encoder.tokenizer.apply_chat_template(row.messages, tokenize=False)
    assert sum(check_masks(encoder, [row]).values()) == 1
