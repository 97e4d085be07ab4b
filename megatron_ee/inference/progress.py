"""Where sequences are, what is asked where their rows end, and what launches count for."""

from collections.abc import Mapping

from megatron_ee.inference.ledger import DepthLedger
from megatron_ee.inference.scheduling.fronts import Front, LaunchPlan
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.stages import Stages
from megatron_ee.inference.work import Work


def front_of(
    slot: int, sequence: DecodingSequence, ledger: DepthLedger, stages: Stages, *, prefill_chunk: int
) -> Front:
    """Its prompt comes in chunks. All but the last one run through all layers, and so does all but the last token where
    an exit's keys and values would not be exact: what comes after needs it."""
    at, num_layers = sequence.at, stages.stops[-1]
    rows = ledger.num_waiting(slot, at) if at else min(len(sequence.unfed), prefill_chunk)
    if not at and rows > 1 and rows == len(sequence.unfed) and sequence.rule.kv_policy == "propagate":
        rows -= 1
    is_part = at == 0 and rows < len(sequence.unfed)
    # where rows are looked at next, or meet some of their own sequence that a neighbour's launch took there
    looked_at = num_layers if is_part else sequence.next_stop(at, num_layers)
    stop = min(looked_at, ledger.next_waiting(slot, at), stages.end(at))
    owes, verifies = sequence.rule.kv_policy != "propagate", sequence.draft is not None and sequence.draft.is_over
    return Front(slot, at, rows, stop, sequence.since, sequence.is_drafting, owes, verifies)


def is_asked(sequence: DecodingSequence, layer: int, num_layers: int) -> bool:
    """Whether it is looked at there, after its newest row, or all rows of its prompt are."""
    if sequence.unfed:
        return layer == num_layers and sequence.scores is not None
    if layer == num_layers or sequence.drafts_at(layer):
        return True
    rule = sequence.rule
    return (layer in rule.thresholds and sequence.scores is None) or layer in rule.heard


def count(plan: LaunchPlan, sequences: Mapping[int, DecodingSequence], work: Work) -> None:
    """What full depth would have run for the same tokens, which have yet to enter; see `savings_of`.

    Args:
        sequences: by slot.
    """
    entering = [sequences[slot] for slot in plan.counts]
    if plan.start > 0:
        joining = sum(of.joins_at == plan.start for of in entering)
        work.turns += joining
        work.rounds += 0 < joining == len(entering)
        return
    is_part = [rows < len(of.unfed) for rows, of in zip(plan.counts.values(), entering, strict=True)]
    parts = sum(is_part)
    drafting = sum(of.is_drafting and not part for of, part in zip(entering, is_part, strict=True))
    turns = len(entering) - drafting - parts
    work.turns += turns
    work.rounds += turns > 0
    work.drafts += drafting > 0
    work.drafted += drafting
    work.prefills += parts == len(entering)
