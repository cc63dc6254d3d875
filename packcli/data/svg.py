"""The marks that `draw.py` draws with, as SVG text: colours for light and dark, edges, words, lines of words.

Sizes are in pixels of the picture at its natural size; y grows downwards. All colours are classes of `STYLE`:

    p0..p11, s0..s11   a document's pale and full colour       page, card   grounds
    tooth, tear        a jagged edge: cut, or cut from what is lost
    padding, lost      hatched, dashed                         frame, mark  outlines
    cross              attention across documents              small, muted, number, name, title, end   words
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from packcli.log import plain

BAR = 13
"""Height of a row's bar."""
_SMALL = 11
_TOOTH = 3.0

COLOURS = 12
_PALE = "cbe0fc fdd4be c6e9c6 f6d0f1 eadeb2 afebee fed2d0 dadaff d8e5b8 b5ecdc f6d9b2 ead4fc"
_STRONG = "539af2 e07937 54b05a cb73c4 b39615 05adb4 e66d71 9088f0 8da523 15b194 ca8a10 b57bdd"
_PALE_DARK = "273e5c 56331f 284529 4f314c 473d13 034649 593030 3a385b 39421b 10473b 4f3815 473455"
_STRONG_DARK = "3772bb ac571d 38853e 9b5295 86700a 118186 b14d51 6b64ba 687c02 11846e 986603 8959aa"
"""Twelve hues of equal lightness and strength (OKLCH), in an order that keeps neighbours apart."""


def _theme(pale: str, strong: str, names: Mapping[str, str]) -> str:
    hues = [f".p{n}{{fill:#{hue}}}" for n, hue in enumerate(pale.split())]
    hues += [f".s{n}{{fill:#{hue}}}" for n, hue in enumerate(strong.split())]
    return "".join([*hues, *(f"{name}{{{value}}}" for name, value in names.items())])


def _colours(
    page: str, card: str, line: str, text: str, muted: str, lost: str, hatch: str, cross: str
) -> dict[str, str]:
    return {
        ".page": f"fill:{page}",
        ".card": f"fill:{card};stroke:{line}",
        ".doc": f"stroke:{card}",
        ".tooth,.tear": f"fill:{card}",
        ".tooth": f"stroke:{text}",
        ".tear,.lost": f"stroke:{lost}",
        ".padding,.frame": f"stroke:{line}",
        ".mark": f"stroke:{muted}",
        ".hatch": f"stroke:{hatch}",
        ".cross": f"fill:{cross}",
        "text": f"fill:{text}",
        ".muted": f"fill:{muted}",
    }


_LIGHT = _colours("#f6f8fa", "#ffffff", "#c3ccd5", "#1f2328", "#57606a", "#cf222e", "#c3ccd5", "#a9b2bb")
_DARK = _colours("#0d1117", "#161b22", "#3d4651", "#e6edf3", "#9aa4af", "#ff7b72", "#3d4651", "#59636e")
STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
    ".title{font-size:20px;font-weight:600}.name{font-size:15px;font-weight:600}"
    f".small{{font-size:{_SMALL}px}}.number{{font-size:9.5px;font-weight:600}}.end{{text-anchor:end}}"
    ".doc{stroke-width:1}.tooth,.tear{stroke-width:1.2}.frame,.mark,.lost{fill:none}.mark{stroke-width:1.5}"
    ".lost{stroke-dasharray:3 2}.padding{fill:url(#packcli-padding)}"
    + _theme(_PALE, _STRONG, _LIGHT)
    + f"@media(prefers-color-scheme:dark){{{_theme(_PALE_DARK, _STRONG_DARK, _DARK)}}}"
)
HATCH = (
    '<defs><pattern id="packcli-padding" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<path class="hatch" d="M-1 1l2-2M0 5l5-5M4 6l2-2"/></pattern></defs>'
)


def teeth(x: float, y: float, side: int, kind: str) -> str:
    """A jagged edge at `x`, biting to the right (`side` 1) or to the left (-1)."""
    step = px(BAR / 6)
    return (
        f'<path class="{kind}" d="M{px(x)} {px(y)}'
        + f"l{px(side * _TOOTH)} {step}l{px(-side * _TOOTH)} {step}" * 3
        + '"/>'
    )


def block(x: float, y: float, width: float) -> str:
    """A path's part: a rectangle just inside a bar whose top is half a pixel above `y`."""
    return f"M{px(x)} {px(y)}h{px(width)}v{BAR - 1}h-{px(width)}z"


def chip(drawn: str, width: float, words: str, kind: str = "small") -> tuple[float, str]:
    """A small drawing with words at its right, for `flow`."""
    return width + 6 + text_width(words), drawn + text(width + 6, 10.5, words, kind)


def flow(chips: Sequence[tuple[float, str]], width: float, pitch: float) -> tuple[str, float]:
    """Things of given widths set in lines like words; and the height they take."""
    x, y, parts = 0.0, 0.0, []
    for wide, drawn in chips:
        if x and x + wide > width:
            x, y = 0.0, y + pitch
        parts.append(at(x, y, drawn))
        x += wide + 16
    return "".join(parts), y + pitch


def at(x: float, y: float, drawn: str) -> str:
    """A drawing moved to (x, y)."""
    return f'<g transform="translate({px(x)} {px(y)})">{drawn}</g>'


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words, escaped; (x, y) is where their base line begins, or ends for the class `end`."""
    return f'<text class="{kind}" x="{px(x)}" y="{px(y)}">{safe(words)}</text>'


def text_width(words: str) -> float:
    """A generous guess for small text: no font is at hand to measure."""
    return len(words) * _SMALL * 0.58


def px(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{round(float(value), 2):g}"


def safe(words: str) -> str:
    """Text for XML, which forbids most control characters even when escaped."""
    return escape(plain(words))
