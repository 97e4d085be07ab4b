"""What comes of rows that have come to an exit, or to the end: tokens, drafts, or nothing yet.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Mapping

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.depth_walk import Arrival, DepthWalk
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.request import Emission
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.speaking import speak, speak_of_drafts
from megatron_ee.inference.speculation.drafter import extend

Sequences = Mapping[int, DecodingSequence]
"""By slot, in the order of their rows."""
Spoken = list[tuple[int, Emission | None]]
"""By slot, a token or several, in order; None: there is none to choose."""


def at_exit(arrival: Arrival, sequences: Sequences, decisions: ExitDecisions) -> Spoken:
    """Exits draft, are heard, or let out: the tokens of those sequences that leave."""
    layer = arrival.layer
    whole = {slot: of for slot, of in sequences.items() if not of.unfed}  # a part of a prompt goes on
    if drafting := {slot: of for slot, of in whole.items() if of.drafts_at(layer)}:
        extend(arrival.ask([*drafting]), [*drafting.values()])
    if heard := {slot: of for slot, of in whole.items() if layer in of.rule.heard}:
        _hear(arrival, heard)
    asking = {slot: of for slot, of in whole.items() if layer in of.rule.thresholds}
    if not asking:
        return []
    asked = arrival.ask([*asking])
    confidences = decisions.leaving(asked, [*asking.values()])
    rows = [row for row, confidence in enumerate(confidences) if confidence is not None]
    if not rows:
        return []
    slots = [*asking]
    leaving = {slots[row]: confidence for row, confidence in enumerate(confidences) if confidence is not None}
    return _speak(asked.of(rows), sequences, leaving)


def at_the_end(arrival: Arrival, sequences: Sequences, walk: DepthWalk) -> Spoken:
    """What full depth says: a token of each sequence, or of its draft what is right, and a token."""
    for of in sequences.values():
        if of.unfed:  # a part of a prompt makes way for the next
            of.at = 0
    whole = {slot: of for slot, of in sequences.items() if not of.unfed}
    if not whole:
        return []
    drafts = {slot: of.draft.num_rows for slot, of in whole.items() if of.draft is not None}
    if not drafts:
        return _speak(arrival.ask([*whole]), sequences, dict.fromkeys(whole, 1.0))
    plain = [slot for slot in whole if slot not in drafts]
    asked = arrival.ask_last({**dict.fromkeys(plain, 1), **drafts})
    num_rows = len(asked.logits)  # of both kinds, in one product
    spoken = _speak(asked.of(range(len(plain))), sequences, dict.fromkeys(plain, 1.0)) if plain else []
    texts = speak_of_drafts(asked.of(range(len(plain), num_rows)), [sequences[slot] for slot in drafts])
    for slot, text in zip(drafts, texts, strict=True):
        walk.work.taken_back += walk.take_back(slot, sequences[slot].num_positions)
        spoken += [(slot, emission) for emission in text]
    return spoken


def _hear(arrival: Arrival, sequences: Sequences) -> None:
    """What this exit says, of sequences whose final logits it corrects."""
    asked = arrival.ask([*sequences])
    for row, of in enumerate(sequences.values()):
        logits_NV = asked.logits if of.request.exit.hears_heads else asked.output_logits
        of.passed[arrival.layer] = logits_NV[row]


def _speak(asked: AskedExit, sequences: Sequences, confidences: Mapping[int, float]) -> Spoken:
    """A token for each sequence, of which the exit has a row each."""
    emissions = speak(asked, [sequences[slot] for slot in confidences], list(confidences.values()))
    for slot, emission in zip(confidences, emissions, strict=True):
        sequences[slot].is_silent = emission is None
    return list(zip(confidences, emissions, strict=True))
