"""Small SVG pictures that are readable on light and on dark pages, and in print."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from hetu.parallel.mask.svg import COLOURS

RANKS = COLOURS[:4]
"""A colour per rank, which shows on white and on black: those of hetu's own pictures."""

STYLE = """\
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .card { fill: #ffffff } .faint { fill: #8c959f } .empty { fill: #eaeef2 } .line { stroke: #8c959f }
    .bold { font-weight: 600 } .small { font-size: 11px } .on { fill: #ffffff; font-size: 10px }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .card { fill: #161b22 } .empty { fill: #262c36 } .on { fill: #ffffff }
    }"""
"""The card behind a picture is drawn, so that a page's own colours don't matter."""


@dataclass
class Picture:
    """A picture under construction; sizes and places are in pixels, from the upper left corner.

    Attributes:
        width: Of the card.
        height: Of the card.
        title: What a screen reader says of it.
    """

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> None:
        """Draws a filled box; ``colour`` is ``#rrggbb`` or a class of the style."""
        fill = f'fill="{colour}"' if colour.startswith("#") else f'class="{colour}"'
        shade = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" {fill}{shade}/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Writes words whose baseline is at y; ``anchor`` is start, middle or end."""
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "") -> None:
        """Draws a thin line."""
        stroke = f'stroke="{colour}" stroke-width="1.5"' if colour else 'class="line"'
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {stroke}/>')

    def svg(self) -> str:
        """The whole file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        card = f'<rect width="{self.width}" height="{self.height}" rx="8" class="card"/>'
        lines = [head, f"  <title>{escape(self.title)}</title>", f"  <style>\n{STYLE}\n  </style>"]
        return "\n".join([*lines, *(f"  {part}" for part in (card, *self.parts)), "</svg>", ""])
