"""One HTML file that a browser shows without this project and without a network: text, tables and pictures.

Whatever is put in is text: names and values from a run's files cannot become markup. The same content gives the same
file, byte for byte.
"""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?[^\d\s]{1,8})?")
"""Also one that carries its unit, as in `1.5x` or `93.1 %`."""

_TEMPLATE = Path(__file__).with_suffix(".jinja")

Value = str | int | float | None
"""A cell: text, a number that is already rounded, or None for what was not measured."""


class HtmlPage:
    """Parts are shown in the order in which they are added.

    Args:
        title: of the page and of the window.
        subtitle: a line below it: of what, when, by which command.
    """

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._parts: list[_Part] = []

    def heading(self, text: str) -> None:
        """Begins a section, which the list of contents names."""
        self._add("heading", text=text, anchor=f"section-{sum(part.kind == 'heading' for part in self._parts) + 1}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def points(self, lines: Iterable[str]) -> None:
        """A list of short sentences."""
        self._add("points", lines=list(lines))

    def facts(self, values: Mapping[str, Value]) -> None:
        """Names and what they are."""
        self._add("facts", values=dict(values))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Value]], *, caption: str = "") -> None:
        """Columns of numbers are aligned to the right, those with text to the left.

        Raises:
            ValueError: a row has not one value for each column.
        """
        held = [list(row) for row in rows]
        if wrong := [row for row in held if len(row) != len(columns)]:
            raise ValueError(f"{len(wrong[0])} values for {len(columns)} columns: {wrong[0]}")
        right = [all(_is_number(row[place]) for row in held) for place in range(len(columns))]
        self._add("table", columns=list(columns), rows=held, right=right, caption=caption)

    def picture(self, figure: "Figure", *, alt: str, caption: str = "") -> None:
        """A figure of matplotlib, held in the page itself.

        Args:
            alt: what it shows, for who cannot see it.
        """
        held = io.BytesIO()
        figure.savefig(held, format="png", metadata={"Software": None})
        self.image(held.getvalue(), alt=alt, caption=caption)

    def image(self, png: bytes, *, alt: str, caption: str = "") -> None:
        """A picture that is there already, as the bytes of a PNG file.

        Args:
            alt: as in `picture`.

        Raises:
            ValueError: it is none, or not a whole one.
        """
        if not (png.startswith(_PNG) and png.endswith(_PNG_END)):
            raise ValueError("not a whole PNG picture")
        self._add("picture", data=base64.b64encode(png).decode("ascii"), alt=alt, caption=caption)

    def details(self, summary: str, text: str) -> None:
        """Long text as it is, folded away until somebody opens it."""
        self._add("details", summary=summary, text=text)

    def save(self, path: Path) -> None:
        """Write the page; a page of that name is replaced once the new one is whole."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        environment.filters["value"] = _as_text
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        whole = template.render(title=self._title, subtitle=self._subtitle, parts=self._parts)
        beside = path.with_name(f"{path.name}.new")
        try:
            beside.write_text(whole, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def _add(self, kind: str, **content: Any) -> None:
        self._parts.append(_Part(kind, content))


class _Part(NamedTuple):
    kind: str
    content: dict[str, Any]


def _as_text(value: Value) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Value) -> bool:
    return value is None or isinstance(value, int | float) or _NUMBER.fullmatch(value) is not None
