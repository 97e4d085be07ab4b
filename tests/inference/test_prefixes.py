"""The tree of known beginnings: what is found is what a list of all texts says."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.inference.prefixes import Prefixes


@settings(max_examples=200)
@given(data=st.data())
def test_what_is_found_is_the_longest_beginning_that_nobody_has_taken(data: st.DataObject) -> None:
    """Against blocks whose whole texts are remembered."""
    size, texts = data.draw(st.integers(1, 3)), st.lists(st.integers(0, 1), max_size=12)
    prefixes, holds, fresh = Prefixes(size), dict[int, tuple[str, tuple[int, ...]]](), iter(range(1000))
    for _ in range(data.draw(st.integers(1, 25))):
        tokens, kind = data.draw(texts), data.draw(st.sampled_from("ab"))
        if holds and data.draw(st.booleans()):
            prefixes.forget(gone := data.draw(st.sampled_from(sorted(holds))))
            del holds[gone]
            assert gone not in prefixes
        else:
            blocks = [next(fresh) for _ in range(len(tokens) // size)]
            prefixes.add(tokens, kind, blocks)
            holds |= {
                block: (kind, tuple(tokens[: (number + 1) * size]))
                for number, block in enumerate(blocks)
                if block in prefixes
            }
        wanted = data.draw(texts)
        found = prefixes.find(wanted, kind)
        for number, block in enumerate(found):
            assert holds[block] == (kind, tuple(wanted[: (number + 1) * size])), "of another text"
        assert len(prefixes) == len(holds)


def test_a_text_that_was_added_is_found_whole_and_the_first_holder_keeps_it() -> None:
    prefixes = Prefixes(2)
    prefixes.add([1, 2, 3, 4, 5], "a", [7, 8])
    assert prefixes.find([1, 2, 3, 4, 9, 9], "a") == [7, 8]
    assert prefixes.find([1, 2, 3, 5], "a") == [7]
    assert prefixes.find([1, 2], "b") == []
    prefixes.add([1, 2, 3, 4, 5, 6], "a", [10, 11, 12])
    assert prefixes.find([1, 2, 3, 4, 5, 6], "a") == [7, 8, 12]
    assert 10 not in prefixes and 12 in prefixes
    prefixes.forget(7)
    assert prefixes.find([1, 2, 3, 4, 5, 6], "a") == []
    prefixes.add([1, 2, 3, 4], "a", [10, 11])
    assert prefixes.find([1, 2, 3, 4, 5, 6], "a") == [10, 11]
