"""Which sends have certainly arrived, and when: so that a stage can let go of what it sent without asking.

A send is finished by waiting for it, and gloo says nothing before that; waiting too early could stop the pipeline. But
a message from a neighbour proves that everything the neighbour had received before it sent that message has arrived.
"""

from collections.abc import Mapping

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.validity import receive_of

SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
_UNDER_WAY = 2  # sends at once to a neighbour that never answers


def deliveries(plan: Plan, stage: int) -> Mapping[Action, tuple[Action, ...]]:
    """For actions of a stage, the sends of its own that can be waited for just after them without delaying anything.

    After a receive: the sends that the neighbour had received before it sent this message. After a send to a neighbour
    that sends nothing back (no gradients: validation): the one before the last, since nothing there depends on us.
    """
    safe: dict[Action, tuple[Action, ...]] = {}
    own_sends = [action for action in plan.actions[stage] if action.kind in SENDS]
    for peer in {receive_of(plan, send).stage for send in own_sends}:
        position = {action: index for index, action in enumerate(plan.actions[peer])}
        sends = [send for send in own_sends if receive_of(plan, send).stage == peer]
        answers = {
            receive_of(plan, action): index
            for action, index in position.items()
            if action.kind in SENDS and receive_of(plan, action).stage == stage
        }
        if not answers:
            safe.update({later: (earlier,) for earlier, later in zip(sends, sends[_UNDER_WAY:], strict=False)})
            continue
        waiting = {send: position[receive_of(plan, send)] for send in sends}
        for receive, sent_at in sorted(answers.items(), key=lambda item: item[1]):
            safe[receive] = tuple(send for send, received_at in waiting.items() if received_at < sent_at)
            for send in safe[receive]:
                del waiting[send]
    return safe
