"""Parts of a self-contained HTML page: text, tables, sections and the page around them. No scripts, no requests.

Whatever is no Markup is text and escaped: names of runs, sources and rows are anybody's. Not here: plots (figures.py).
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_sft.log import printable

COLOURS = (
    ("#2868b8", "#6ea8f0"),
    ("#c8561c", "#f2995a"),
    ("#22855a", "#5cc596"),
    ("#9a3fa0", "#d78be0"),
    ("#8a6a10", "#d9b84a"),
    ("#b02f4c", "#f08098"),
    ("#1f8596", "#5cc4d6"),
    ("#616a78", "#a8b2c2"),
)
"""Of the lines of a plot, on a light and on a dark page; the CSS variables --c0 to --c7."""
_THEMES = (
    "--ink:#1b2230;--soft:#5a6474;--line:#dde2ea;--back:#ffffff;--card:#f6f7f9;--warn:#9a4a00;--trained:#cdeccd;--other:#f3dfa0",
    "--ink:#e6e9ef;--soft:#9aa4b4;--line:#333b49;--back:#12161d;--card:#1a202a;--warn:#f0a860;--trained:#1f5130;--other:#5c4a12",
)


class Markup(str):
    """HTML whose text is escaped already."""


def escaped(value: Any) -> Markup:
    """Escaped; control characters and the like stand as escapes."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value))))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    return Markup(between.join(escaped(part) for part in parts))


def tag(name: str, content: Any = "", attributes: str = "") -> Markup:
    """<name attributes>content</name>; what stands in attributes must be safe."""
    return Markup(f"<{name}{' ' if attributes else ''}{attributes}>{escaped(content)}</{name}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], words: Sequence[int] = (0,)) -> Markup:
    """A table that scrolls by itself where the screen is too narrow.

    Args:
        head: of the columns; none: no head.
        rows: their cells.
        words: columns of text, to the left; the others are numbers, to the right.
    """
    sides = ["w" if column in words else "n" for column in range(max([len(head), *(len(row) for row in rows)], default=0))]
    lines = [
        join(tag(kind, cell, f'class="{side}"') for cell, side in zip(row, sides, strict=False))
        for kind, row in [*([("th", head)] if head else []), *(("td", row) for row in rows)]
    ]
    return tag("div", tag("table", join(tag("tr", line) for line in lines)), 'class="scroll"')


def pairs(items: Iterable[tuple[Any, Any]]) -> Markup:
    """Figures in large letters, each with its name."""
    tiles = (tag("div", join([tag("dt", name), tag("dd", value)])) for name, value in items)
    return tag("dl", join(tiles), 'class="tiles"')


def details(summary: Any, content: Any) -> Markup:
    """Shown by a click."""
    return tag("details", join([tag("summary", summary), content]))


def swatch(colour: int, style: str = "line") -> Markup:
    """The mark of a line in a legend."""
    return Markup(f'<i class="s {style}" style="--c:var(--c{colour % len(COLOURS)})"></i>')


def trained_text(runs: Iterable[tuple[str, float]]) -> Markup:
    """Text as it is trained: (text, weight) after another, weight 0 is read alone."""
    kinds = {0.0: "m", 1.0: "t"}
    return tag("pre", join(tag("span", part, f'class="{kinds.get(weight, "o")}"') for part, weight in runs))


LEGEND = Markup(
    '<p class="soft"><span class="t">trained</span> <span class="o">trained with another weight than 1</span> '
    '<span class="m">read alone</span></p>'
)


def page(title: str, sections: Sequence[tuple[str, Any]], lead: Any = "", foot: Any = "") -> str:
    """The whole page.

    Args:
        title: also the first heading.
        sections: (heading, content).
        lead: below the title.
        foot: the last line.
    """
    anchors = [f"s{number}" for number in range(len(sections))]
    links = join(tag("a", head, f'href="#{anchor}"') for anchor, (head, _) in zip(anchors, sections, strict=True))
    body = [tag("header", join([tag("h1", title), lead]))]
    if len(sections) > 2:
        body.append(tag("nav", links))
    for anchor, (head, content) in zip(anchors, sections, strict=True):
        body.append(tag("section", join([tag("h2", head), content]), f'id="{anchor}"'))
    body.append(tag("footer", foot))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title><style>{_style()}</style></head>\n'
        f"<body>{join(body, chr(10))}</body></html>\n"
    )


def _style() -> str:
    light, dark = (
        ";".join([theme, *(f"--c{number}:{pair[side]}" for number, pair in enumerate(COLOURS))])
        for side, theme in enumerate(_THEMES)
    )
    return f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"


_RULES = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:70rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2.2rem 0 .7rem}
h3{font-size:1rem;margin:1.3rem 0 .5rem}p{margin:.4rem 0}.soft,figcaption span,footer,summary{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin-top:1rem;padding:.5rem 0;border-top:1px solid var(--line);
border-bottom:1px solid var(--line)}a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}
section{scroll-margin-top:1rem}footer{margin-top:3rem;font-size:.85rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.9rem}
figure{margin:0;padding:.7rem .8rem .4rem;background:var(--card);border:1px solid var(--line);border-radius:8px;
break-inside:avoid;min-width:0;
display:flex;flex-direction:column}
figcaption{margin-bottom:.3rem;font-weight:600}figcaption span{font-weight:400;font-size:.85rem}
svg{display:block;width:100%;height:auto;margin-top:auto;stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:inherit}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;list-style:none;margin:.2rem 0;padding:0;font-size:.85rem}
.s{display:inline-block;width:1.3em;height:0;border-top:3px solid var(--c);vertical-align:middle;margin-right:.4em}
.s.dashed{border-top-style:dashed}.s.points{width:.6em;height:.6em;border:0;border-radius:50%;background:var(--c)}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td:first-child,th:first-child{padding-left:0}th{color:var(--soft);font-weight:600}.n{text-align:right;white-space:nowrap}
td.w{min-width:7rem;max-width:32rem}
ul.said{padding-left:1.2rem;margin:.6rem 0}ul.said li{margin:.2rem 0}.warn{color:var(--warn)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.7rem .9rem;margin:.5rem 0;font:13px/1.5 ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace;
max-height:32rem;overflow:auto}
.t{background:var(--trained)}.o{background:var(--other)}.m{color:var(--soft)}.a{box-shadow:inset 0 -2px #80808066}
details{margin:.6rem 0}summary{cursor:pointer}.pack{display:flex;height:1.1em;margin:2px 0;background:var(--card)}
.pack i{background:var(--c0);border-right:1px solid var(--back)}
@media(max-width:30rem){body{font-size:14px;padding-top:1rem}dd{font-size:1.05rem}
.tiles{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))}}
@media print{body{font-size:10pt;max-width:none;padding:0}nav{display:none}.figures{grid-template-columns:1fr 1fr}
pre{max-height:none}h2{break-after:avoid}tr{break-inside:avoid}.scroll{overflow:visible}
.t,.o,.s,.pack,.pack i{print-color-adjust:exact}}
"""
