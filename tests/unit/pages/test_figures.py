"""Plots as SVG in a page: size, text as it was given, colours of the page."""

import importlib.util
import re

import pytest

from megatron_sft.errors import ConfigError
from megatron_sft.pages.figures import Series, _short, chart, histogram, require_matplotlib

HOSTILE = "</svg><script>$\\frac{1}"


def test_a_long_line_is_means_with_a_band_and_a_page_of_60_figures_fits():
    """Eight runs, each with a line and a dashed one of 3,000 points."""
    x = list(range(3000))
    series = [Series(f"run {n}", x, [n + (i * 37 % 101) / 100 for i in x], n % 8, ("line", "dashed")[n // 8]) for n in range(16)]
    drawn = chart("Loss", "nats", series)
    assert len(drawn) * 60 < 3 * 2**20 and drawn.count("<li>") == 16
    assert {f"var(--c{number})" for number in range(8)} <= set(re.findall(r"var\(--c[0-9]\)", drawn))
    alone = chart("Loss", "nats", series[:1])
    assert "fill-opacity: 0.2" in alone and "fill-opacity" not in chart("Loss", "nats", [Series("a", [1, 2], [3.0, 4.0])])


def test_names_are_text_and_numbers_are_what_they_were():
    drawn = chart(HOSTILE, HOSTILE, [Series(HOSTILE, [1, 2], [0.005, 0.0125]), Series("b", [1], [0.01])])
    assert "<script" not in drawn and drawn.count("&lt;/svg&gt;&lt;script&gt;$\\frac{1}") == 3
    assert ">0.006<" in drawn and ">iteration<" in drawn and "http" not in drawn and "#0" not in drawn


def test_values_that_are_no_measurements_are_left_out():
    values = [1.0, float("nan"), float("inf"), -1e300, 1e308, 2.0]
    lines = re.findall(r'<path d="(M [^"]*)" clip-path', chart("Loss", "", [Series("a", range(6), values)]))
    assert [line.count("L") for line in lines if "z" not in line][-1] == 1, "one line of two points"
    assert "<svg" in chart("Loss", "", [Series("a", [1], [float("nan")])])


def labels(drawn):
    """Of the vertical axis."""
    return re.findall(r">([^<>\n]+)</text", drawn.partition(">iteration<")[2])


def test_a_wide_range_is_logarithmic_where_it_may_be():
    wide = [Series("a", [1, 2, 3], [1.0, 10.0, 1000.0])]
    assert labels(chart("Norm", "", wide, is_logarithmic=True)) == ["1", "10", "100", "1000"]
    assert labels(chart("Norm", "", wide)) == ["0", "500", "1000"]
    wider = [Series("a", [1, 2, 3], [3e-5, 10.0, 60000.0])]
    assert labels(chart("Norm", "", wider, is_logarithmic=True)) == ["0.0001", "0.01", "1", "100", "10k"]
    assert "<svg" in chart("Norm", "", [Series("a", [1, 2], [0.0, 1000.0])], is_logarithmic=True)
    assert "<svg" in histogram("Lengths", "tokens", [1, 10, 4096], [5, 1])


def test_ticks_are_short_and_tell_neighbours_apart():
    assert [_short(value, 10 * abs(value)) for value in (0, 1500, 25000, 4.2e6, 3e10, -20000, 5e-05)] == [
        "0",
        "1500",
        "25k",
        "4.2M",
        "30G",
        "-20k",
        "5e-05",
    ]
    assert _short(100_010, 20) == "100.01k"


def test_without_matplotlib_the_pip_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--html needs matplotlib .* Run: pip install 'megatron-sft\[report\]'"):
        require_matplotlib("--html")
