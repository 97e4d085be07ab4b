"""The built-in corpus."""

import math

import numpy as np
import pytest

from megatron_ee.data.corpus import bigram_cross_entropy, documents


def test_the_standard_library_is_a_corpus() -> None:
    first = next(iter(documents()))
    texts = list(documents())
    assert first == texts[0]
    assert sum(map(len, texts)) > 5_000_000
    assert any("def " in text for text in texts[-20:]), "every split holds code"


def test_bigram_cross_entropy() -> None:
    assert bigram_cross_entropy(np.array([0, 1] * 50, dtype=np.uint16)) == pytest.approx(0)
    random = np.random.default_rng(0).integers(4, size=200_000).astype(np.uint16)
    assert bigram_cross_entropy(random) == pytest.approx(math.log(4), abs=1e-3)
