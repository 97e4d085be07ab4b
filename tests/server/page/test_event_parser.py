"""The page's parser of server-sent events, on streams that are cut anywhere."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
PARSE = """async (pieces) => {
  const { EventParser } = await import("/sse.js");
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(Uint8Array.from(piece)));
}"""


def parsed(page: Page, pieces: list[bytes]) -> list[str]:
    return page.evaluate(PARSE, [list(piece) for piece in pieces])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(LINE, min_size=1, max_size=3), max_size=3), ENDS, st.data())
def test_events_do_not_depend_on_where_they_are_cut(
    page: Page, events: list[list[str]], end: str, data: st.DataObject
) -> None:
    written = "".join(
        ": a comment" + end + "".join(f"data: {line}{end}" for line in lines) + "event: other" + end + end
        for lines in events
    )
    whole = (written + ": the end").encode()  # a \r that comes last is not yet known for a whole line end
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parsed(page, pieces) == ["\n".join(lines) for lines in events]


def test_byte_by_byte(page: Page) -> None:
    whole = "\ufeffdata: 数é🙂\r\ndata:two\r\n\r\ndata\n\ndata:  kept\n\nid: 1\n\ndata: never ended".encode()
    assert parsed(page, [bytes([byte]) for byte in whole]) == ["数é🙂\ntwo", "", " kept"]
