"""What the exits' logits make of the final ones, for quality: all layers run, and then each exit is heard.

`sled` and `dola` are pure functions of logits; `corrected` gives each row of a batch what its own request asks for.
A row depends on no other: of rows that are corrected together and alone, numbers agree but for the order of sums.
"""

from megatron_ee.inference.corrections.corrected import HeardRow, corrected
from megatron_ee.inference.corrections.dola import dola
from megatron_ee.inference.corrections.sled import sled
from megatron_ee.inference.corrections.vocabulary import check_shared_vocabulary

__all__ = ["HeardRow", "check_shared_vocabulary", "corrected", "dola", "sled"]
