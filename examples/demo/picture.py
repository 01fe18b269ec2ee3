"""Draws docs/picture.svg: the loss of a run, and a row of it with what is trained in colour.

    python examples/demo/picture.py SAVE_FOLDER HF_FOLDER ROWS.jsonl > docs/picture.svg

The one in docs/ is SmolLM2-135M-Instruct on examples/data/gsm8k_train_400.jsonl on a CPU, the first 16 iterations of
--seq-length 512 --global-batch-size 1 --train-iters 26 --lr 1e-4 --lr-warmup-iters 3.
"""

import html
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sft.config.run import DataConfig
from megatron_sft.data.chat import ChatEncoder, load_tokenizer
from megatron_sft.data.preview import decoder, pieces
from megatron_sft.data.schema import to_row
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import Document

WIDTH, HEIGHT, SPLIT = 960, 300, 400
COLUMNS, LINE = 66, 17
TRAINED, PLAIN = "#bfe8bf", "#f1f1f1"


def losses(save: Path) -> list[float]:
    """Of each iteration."""
    return [json.loads(line)["sft/loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def curve(values: Sequence[float]) -> Iterator[str]:
    """A line of the losses, and one of their mean over eight iterations."""
    left, right, top, bottom = 48, SPLIT - 20, 40, HEIGHT - 36
    least, most = min(values) * 0.95, max(values) * 1.02

    def points(series: Sequence[float]) -> str:
        step = (right - left) / (len(values) - 1)
        heights = (bottom - (value - least) / (most - least) * (bottom - top) for value in series)
        return " ".join(f"{left + index * step:.1f},{height:.1f}" for index, height in enumerate(heights))

    means = [sum(values[max(0, i - 7) : i + 1]) / len(values[max(0, i - 7) : i + 1]) for i in range(len(values))]
    yield f'<path d="M{left},{top} V{bottom} H{right}" stroke="#888" fill="none"/>'
    yield f'<polyline points="{points(values)}" fill="none" stroke="#b9cde0"/>'
    yield f'<polyline points="{points(means)}" fill="none" stroke="#2b6aa3" stroke-width="2.5"/>'
    yield from (
        f'<text x="{left - 6}" y="{bottom - (value - least) / (most - least) * (bottom - top) + 4:.1f}" text-anchor="end">'
        f"{value:.1f}</text>"
        for value in (max(values), min(values))
    )
    yield f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{len(values)} iterations</text>'
    yield f'<text x="{left}" y="24" font-weight="bold">loss per trained token</text>'


def sample(folder: str, rows: str) -> Iterator[str]:
    """The first row as the model sees it; trained tokens on green."""
    config = DataConfig(tokenizer_model=folder, train_data=(rows,))
    tokenizer = load_tokenizer(config)
    where, record = next(iter(open_source(rows, config)))
    encoded = ChatEncoder(tokenizer, config).encode(to_row(record, where, config))[0]
    runs = itertools.groupby(pieces(Document(encoded.tokens, encoded.loss_mask), decoder(tokenizer)), lambda part: part[1] > 0)
    yield f'<text x="{SPLIT + 10}" y="24" font-weight="bold">what is trained (green)</text>'
    y = 48
    for is_trained, parts in runs:
        for paragraph in "".join(text for text, _, _ in parts).split("\n"):
            for line in textwrap.wrap(paragraph, COLUMNS, drop_whitespace=False):
                if y > HEIGHT - 12:
                    return
                colour, width = TRAINED if is_trained else PLAIN, 8 * len(line) + 6
                yield f'<rect x="{SPLIT + 8}" y="{y - 13}" width="{width}" height="{LINE}" fill="{colour}"/>'
                yield f'<text x="{SPLIT + 11}" y="{y}" class="m" textLength="{8 * len(line)}">{html.escape(line)}</text>'
                y += LINE


def picture(save: Path, folder: str, rows: str) -> str:
    """The SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">'
    style = "<style>.m{font-family:monospace;font-size:13px;white-space:pre}</style>"
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([head, style, back, *curve(losses(save)), *sample(folder, rows), "</svg>"])


if __name__ == "__main__":
    print(picture(Path(sys.argv[1]), *sys.argv[2:4]))
