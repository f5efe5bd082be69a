"""The report's paper: one HTML document, its styles, and the few elements that it is made of.

Everything that comes from a user goes through `text`; functions that take markup say so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

DASH, MINUS = "\u2013", "\u2212"

# Okabe-Ito colours, which colour-blind readers tell apart; in the dark the same hues, lighter. `fall` is vermillion for
# text, dark enough to be read on paper.
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--muted:#5d6670;--line:#e1e5e9;--soft:#f4f6f8;
--blue:#0072b2;--sky:#56b4e9;--green:#009e73;--orange:#e69f00;--vermillion:#d55e00;--purple:#cc79a7;--grey:#87909a;
--fall:#b85000;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--serif:Charter,"Bitstream Charter","Iowan Old Style",Georgia,"Times New Roman",serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7ea;--muted:#9ea7b1;--line:#2e343b;
--soft:#1c2025;--blue:#4aa8e0;--sky:#86cbf5;--green:#2dbd94;--orange:#ecb23a;--vermillion:#f0854a;--purple:#de98bf;--fall:#f0854a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:62rem;padding:2.5rem 1.25rem 5rem;background:var(--paper);color:var(--ink);
overflow-wrap:anywhere;font:1rem/1.6 var(--sans);print-color-adjust:exact;-webkit-print-color-adjust:exact}
p{margin:.6rem 0;max-width:44rem}a{color:var(--blue)}
h1,h2{font-family:var(--serif);line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.7rem,5vw,2.5rem);font-weight:600;margin:.3rem 0 1rem;max-width:24em}
h2{font-size:1.5rem;font-weight:600;margin:0 0 .4rem}
h3{font-size:1rem;margin:2rem 0 .4rem}
.eyebrow{color:var(--muted);font-size:.85rem;margin:0}
.lead{font-size:1.08rem}.note,figcaption{color:var(--muted);font-size:.88rem;line-height:1.5}
section{margin-top:3rem;padding-top:2rem;border-top:1px solid var(--line)}
nav{margin-top:1.6rem;font-size:.88rem;color:var(--muted);display:flex;flex-wrap:wrap;gap:.15rem 1.1rem}
nav a{color:inherit;text-decoration:none;padding:.2rem 0}nav a:hover{color:var(--ink);text-decoration:underline}
.warning{border-left:4px solid var(--vermillion);background:var(--soft);padding:.7rem 1rem;margin:1.2rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:1px;margin:1.8rem 0 0;
background:var(--line);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tile{background:var(--paper);padding:1rem 1.1rem}.tile b{display:block;font:600 1.55rem/1.25 var(--serif)}
.tile b s{text-decoration:none;color:var(--grey);font-weight:400}
.tile i{font-style:normal;color:var(--grey);padding:0 .2em}
.tile span{display:block;color:var(--muted);font-size:.85rem;line-height:1.45}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:2rem 1.4rem;margin:1.4rem 0}
.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
figure{margin:0;min-width:0}figure svg{display:block;width:100%;height:auto;overflow:visible}
figure svg *{stroke-linejoin:round}figcaption{margin-top:.4rem}figcaption b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto;margin:1.2rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.92rem;line-height:1.4}
th,td{padding:.5rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:middle;
font-variant-numeric:tabular-nums}td:not(.l){white-space:nowrap}
th:first-child,td:first-child{padding-left:.3rem}
thead th{color:var(--muted);font-weight:500;font-size:.82rem;overflow-wrap:normal;
border-bottom:1.5px solid var(--muted);vertical-align:bottom}
tbody th{font-weight:500}th.l,td.l{text-align:left;min-width:5rem}
tbody th[scope=row]{text-align:left;position:sticky;left:0;background:var(--paper);z-index:1;min-width:8rem}
tr.chosen>*{background:var(--soft)}tr.chosen th[scope=row]{background:var(--soft);font-weight:650}
small{display:block;color:var(--muted);font-weight:400;font-size:.82rem}
td strong{font-weight:700}
.track{position:relative;height:1.1rem;min-width:9rem;margin:0 .4rem;
background:linear-gradient(90deg,var(--line) 1px,transparent 1px) 0 0/25% 100%;border-right:1px solid var(--line)}
.track.plain{background:none;border-left:1px solid var(--line)}
.track u,.track i{position:absolute;top:50%;transform:translateY(-50%);text-decoration:none}
.track u{height:3px;border-radius:2px;background:var(--blue);opacity:.55}.track u.down{background:var(--vermillion)}
.track i{width:.72rem;height:.72rem;margin-left:-.36rem;border-radius:50%;background:var(--blue)}
.track i.before{background:var(--paper);border:2px solid var(--grey)}.track i.down{background:var(--vermillion)}
.track u.ci{background:var(--grey);opacity:.7}.track i.other{background:var(--grey)}
.ends{display:flex;justify-content:space-between;margin:0 .4rem}.space{display:inline-block;min-width:7rem}
.bar{display:block;height:.6rem;background:var(--sky);border-radius:1px;min-width:1px}
.up{color:var(--blue)}.down{color:var(--fall)}.none{color:var(--muted)}
.key{display:inline-block;width:.7rem;height:.7rem;border-radius:50%;background:var(--blue);vertical-align:-.06rem}
.key.before{background:none;border:2px solid var(--grey)}.key.down{background:var(--vermillion)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
.thumbs{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:.35rem;max-width:26rem}
.thumbs img,.shots img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:4px;
background:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.8rem 1.4rem;margin:1.4rem 0}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:1.4rem 1rem;margin:1.4rem 0}
.shots code{display:block;font-size:.78em}
.map use{stroke-width:0;opacity:.85}.map .w{fill:var(--paper);stroke-width:1.7;opacity:1}.map use:hover{opacity:.5}
pre{background:var(--soft);border-radius:6px;padding:1rem;overflow-x:auto;font:.8rem/1.5 var(--mono);tab-size:2}
code{font-family:var(--mono);font-size:.86em}
details{margin:1.2rem 0}summary{cursor:pointer;font-weight:600}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.3rem 1.2rem;font-size:.92rem}
dt{color:var(--muted)}dd{margin:0}li{margin:.45rem 0;max-width:44rem}ul{padding-left:1.2rem}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
@media (max-width:40rem){body{padding-top:1.4rem}section{margin-top:2.2rem;padding-top:1.4rem}
th,td{padding:.45rem .35rem}.track{min-width:6rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}
td small{white-space:normal}.spare{display:none}tbody th[scope=row]{min-width:7rem}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll{overflow:visible}
section{margin-top:1.4rem;padding-top:1rem}table{font-size:8.5pt}th,td{padding:.25rem .4rem}.track{min-width:5rem}
figure,tr,.tile,.warning,.pair{break-inside:avoid}h2,h3{break-after:avoid}
thead{display:table-header-group}tbody th[scope=row]{position:static}
details::details-content{content-visibility:visible}.shots{grid-template-columns:repeat(5,1fr)}
.wide{grid-template-columns:1fr 1fr}.tiles{grid-template-columns:repeat(4,1fr)}small{font-size:7.5pt}
.legend{break-after:avoid}
pre{white-space:pre-wrap}}
"""


def document(title: str, body: str) -> str:
    """A whole HTML document; `body` is markup. Its policy forbids scripts and everything that is not in the file."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(page: str, path: str | Path) -> None:
    """Write a document whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def text(value: Any) -> str:
    """Anything as text that is safe between tags and in quoted attributes."""
    return escape(str(value), quote=True)


def breakable(value: Any) -> str:
    """A name as markup that may be broken after `_`, `-` and `/`, as file names and classes of folders want it."""
    return re.sub(r"([_/-])(?=\w)", r"\1<wbr>", text(value))


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading."""

    anchor: str
    link: str
    """Its short name in the page's navigation."""
    title: str
    content: str
    """Markup."""

    def markup(self) -> str:
        """The whole section."""
        return f'<section id="{self.anchor}">\n<h2>{text(self.title)}</h2>\n{self.content}\n</section>'


def figure(svg: str, caption: str, max_width_px: int, min_width_px: int = 0) -> str:
    """A picture with its caption (both markup); under `min_width_px` it scrolls instead of shrinking."""
    inner = f'<div style="min-width:{min_width_px}px">{svg}</div>' if min_width_px else svg
    box = f'<div class="scroll" tabindex="0">{inner}</div>' if min_width_px else inner
    return f'<figure style="max-width:{max_width_px}px">{box}<figcaption>{caption}</figcaption></figure>'


@dataclass(frozen=True)
class Column:
    """A column of a table: `heading` is markup; numbers are set flush right; `spare` ones give way on a phone."""

    heading: str
    left: bool = False
    spare: bool = False

    def classes(self) -> str:
        """The class attribute of its cells."""
        names = " ".join(name for name, is_so in (("l", self.left), ("spare", self.spare)) if is_so)
        return f' class="{names}"' if names else ""


Columns: TypeAlias = list[Column | str]


def table(columns: Columns, rows: Iterable[Sequence[str]], note: str = "", chosen: int = -1) -> str:
    """A table whose first column names the row and stays in sight when the rest is scrolled.

    Args:
        columns: A string stands for a plain column of numbers.
        rows: Cells, markup.
        note: Markup under the table.
        chosen: Row that stands out.
    """
    styled = [column if isinstance(column, Column) else Column(column) for column in columns]
    styled[0] = replace(styled[0], left=True)
    head = "".join(f'<th scope="col"{column.classes()}>{column.heading}</th>' for column in styled)
    lines = []
    for number, (name, *cells) in enumerate(rows):
        mark = ' class="chosen"' if number == chosen else ""
        rest = "".join(f"<td{column.classes()}>{cell}</td>" for cell, column in zip(cells, styled[1:], strict=True))
        lines.append(f'<tr{mark}><th scope="row">{name}</th>{rest}</tr>')
    body = "\n".join(lines)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inner}</div>' + (f'\n<p class="note">{note}</p>' if note else "")


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Pairs of a term (text) and what it is (markup)."""
    return f"<dl>{''.join(f'<dt>{text(term)}</dt><dd>{meaning}</dd>' for term, meaning in items)}</dl>"


def percent(share: float | None, digits: int = 1) -> str:
    """0.7381 -> `73.8`; a dash where there is none. The unit stands in the heading or in the sentence."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}"


def span(interval: tuple[float, float]) -> str:
    """`69.8-76.5`, with a dash as long as it should be."""
    return f"{percent(interval[0])}{DASH}{percent(interval[1])}"


def known_span(interval: Sequence[float | None] | None, digits: int = 1) -> str:
    """A span, or a dash where there is no interval."""
    if interval is None or None in interval:
        return DASH
    low, high = interval
    return f"{percent(low, digits)}{DASH}{percent(high, digits)}"


def change(before: float | None, after: float | None) -> str:
    """The difference in points, signed and coloured."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return f'<span class="none">{DASH}</span>'
    points = round(100 * (after - before), 1)
    kind = "up" if points > 0 else "down" if points < 0 else "none"
    return f'<span class="{kind}">{_signed(points)}</span>'


def signed_points(difference: float) -> str:
    """0.117 -> `+11.7`."""
    return _signed(round(100 * difference, 1))


def move_track(before: float | None, after: float | None) -> str:
    """A line from 0 to 100 % with a ring where a class stood and a dot where it stands."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return '<div class="track"></div>'
    low, high = sorted((before, after))
    down = "down" if after < before else ""
    return (
        f'<div class="track" aria-hidden="true"><u class="{down}" style="left:{100 * low:.1f}%;'
        f'width:{100 * (high - low):.1f}%"></u><i class="before" style="left:{100 * before:.1f}%"></i>'
        f'<i class="{down}" style="left:{100 * after:.1f}%"></i></div>'
    )


def interval_track(value: float, interval: tuple[float, float], scale: tuple[float, float], chosen: bool) -> str:
    """A dot on its interval, on the scale that all rows of the table share."""
    start, end = scale
    low, high, at = (100 * (x - start) / (end - start) for x in (*interval, value))
    kind = "" if chosen else "other"
    return (
        f'<div class="track plain" aria-hidden="true"><u class="{"" if chosen else "ci"}" style="left:{low:.1f}%;'
        f'width:{high - low:.1f}%"></u><i class="{kind}" style="left:{at:.1f}%"></i></div>'
    )


def scale_ends(low: float, high: float) -> str:
    """The heading over a column of tracks: where their scale begins and ends, in percent."""
    return f'<span class="ends"><span>{percent(low, 0)}</span><span>{percent(high, 0)}</span></span>'


def legend(items: Iterable[str]) -> str:
    """Entries (markup) of a legend, set in a line that wraps."""
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"
