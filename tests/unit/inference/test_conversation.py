from megatron_sft.inference.conversation import Stream
from tests.text_models import byte_tokenizer


def test_characters_are_shown_whole_and_cannot_drive_the_terminal() -> None:
    tokenizer = byte_tokenizer()
    text = "caf\u00e9 \U0001f600\x1b[31m!"
    tokens = [*tokenizer(text)["input_ids"], 0xFF]
    stream = Stream(tokenizer.decode)
    pieces = [stream.add(token) for token in tokens]
    assert pieces[:9] == ["c", "a", "f", "", "\u00e9", " ", "", "", ""]
    assert "".join([*pieces, stream.end()]) == "caf\u00e9 \U0001f600\\x1b[31m!" + tokenizer.decode([0xFF])
