"""What comes of rows that have come to an exit, or to the end: tokens, drafts, or nothing yet.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Mapping

from megatron_ee.inference.answers import Answer, Answers, Passed, Said, Scored, Silence
from megatron_ee.inference.arrivals import Arrival
from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.exit_decisions import ExitDecisions
from megatron_ee.inference.scoring import scores_of
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.speaking import speak, speak_of_drafts
from megatron_ee.inference.speculation.drafter import draft

Sequences = Mapping[int, DecodingSequence]
"""By slot, in the order of their rows."""


def at_exit(arrival: Arrival, sequences: Sequences, decisions: ExitDecisions) -> Answers:
    """Exits draft, are heard, or let out."""
    layer = arrival.layer
    whole = {slot: of for slot, of in sequences.items() if not of.unfed}  # a part of a prompt goes on
    answers: dict[int, Answer] = {}
    if drafting := {slot: of for slot, of in whole.items() if of.drafts_at(layer)}:
        answers.update(zip(drafting, draft(arrival.ask([*drafting]), [*drafting.values()]), strict=True))
    if heard := {slot: of for slot, of in whole.items() if layer in of.rule.heard}:
        _hear(arrival, heard)
    if asking := {slot: of for slot, of in whole.items() if layer in of.rule.thresholds and of.scores is None}:
        answers.update(_let_out(arrival.ask([*asking]), asking, decisions))
    return answers


def at_the_end(arrival: Arrival, sequences: Sequences) -> Answers:
    """What full depth says: a token of each sequence, or of its draft what is right, and a token; and of prompts that
    are scored, before that, how likely they are."""
    whole, scored = {}, {}
    for slot, sequence in sequences.items():
        if not sequence.unfed:
            whole[slot] = sequence
        if sequence.scores is not None:
            scored[slot] = sequence
    answers = _at_the_end(arrival, whole) if whole else {}
    if not scored:
        return answers
    found = scores_of(arrival, scored)
    own = {slot: Silence() if of is None else Scored(of, answers.get(slot)) for slot, of in found.items()}
    return {**answers, **own}


def _at_the_end(arrival: Arrival, whole: Sequences) -> Answers:
    drafts = {slot: of.draft.num_rows for slot, of in whole.items() if of.draft is not None}
    if not drafts:
        return _speak(arrival.ask([*whole]), whole, dict.fromkeys(whole, 1.0))
    plain = [slot for slot in whole if slot not in drafts]
    asked = arrival.ask_last({**dict.fromkeys(plain, 1), **drafts})
    num_rows = len(asked.logits)  # of both kinds, in one product
    answers = _speak(asked.of(range(len(plain))), whole, dict.fromkeys(plain, 1.0)) if plain else {}
    of_drafts = speak_of_drafts(asked.of(range(len(plain), num_rows)), [whole[slot] for slot in drafts])
    return {**answers, **dict(zip(drafts, of_drafts, strict=True))}


def _hear(arrival: Arrival, sequences: Sequences) -> None:
    """What this exit says, of sequences whose final logits it corrects."""
    asked = arrival.ask([*sequences])
    for row, of in enumerate(sequences.values()):
        logits_NV = asked.logits if of.request.exit.hears_heads else asked.output_logits
        of.passed[arrival.layer] = logits_NV[row]


def _let_out(asked: AskedExit, sequences: Sequences, decisions: ExitDecisions) -> dict[int, Answer]:
    decided = decisions.of(asked, [*sequences.values()])
    answers: dict[int, Answer] = {}
    rows: list[int] = []
    leaving: dict[int, float] = {}
    for row, (slot, decision) in enumerate(zip(sequences, decided, strict=True)):
        if decision.leaves:
            rows.append(row)
            leaving[slot] = decision.confidence
        elif decision.choice is not None:
            answers[slot] = Passed(decision.choice)
    return {**answers, **_speak(asked.of(rows), sequences, leaving)} if rows else answers


def _speak(asked: AskedExit, sequences: Sequences, confidences: Mapping[int, float]) -> dict[int, Answer]:
    """A token for each sequence, of which the exit has a row each."""
    emissions = speak(asked, [sequences[slot] for slot in confidences], list(confidences.values()))
    return {
        slot: Silence() if emission is None else Said((emission,))
        for slot, emission in zip(confidences, emissions, strict=True)
    }
