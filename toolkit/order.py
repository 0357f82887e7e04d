"""How the path is differentiated, in one word."""

from dataclasses import replace

from toolkit.errors import UserError, unknown
from toolkit.learner import Learner
from toolkit.objectives import Implicit
from toolkit.rules import Proximal

ORDERS = ("second", "first", "truncated:2", "annealed:0.3", "implicit")


def with_order(learner: Learner, order: str) -> Learner:
    """The learner with its path differentiated in this order.

    "second"       through every inner step: the exact gradient
    "first"        through none, so no graph of inner steps is built
    "truncated:k"  through the last k inner steps
    "annealed:f"   first order for the fraction f of the training, then second (Antoniou et al. 2019, section 4)
    "implicit"     at the end of a proximal path (Rajeswaran et al. 2019): `objectives.Implicit`, `rules.Proximal`

    Raises UserError for another word, and for more steps than the learner takes.
    """
    kind, colon, number = str(order).partition(":")
    if kind not in {known.partition(":")[0] for known in ORDERS} or {bool(colon), bool(number)} != {
        kind in ("truncated", "annealed")
    }:
        raise unknown("order", str(order), ORDERS)
    phases = tuple((first, {key: v for key, v in changes.items() if key != "order"}) for first, changes in learner.phases)
    if kind == "first":
        return replace(learner, order=0, phases=phases)
    if kind == "truncated":
        if not number.isdecimal():
            raise UserError(f"order {order!r}: give the number of last inner steps that are of second order, as truncated:2")
        return replace(learner, order=int(number), phases=phases)
    if kind == "annealed":
        if not number.replace(".", "", 1).isdecimal() or not 0 <= float(number) <= 1:
            raise UserError(f"order {order!r}: give the fraction of the training that is of first order, as annealed:0.3")
        if phases:
            raise UserError(f"{learner.name} has phases of its own, between which order {order!r} would stand; take it without")
        return replace(learner, order=None, phases=((0.0, {"order": 0}), (float(number), {})))
    if kind == "implicit":
        if phases:
            raise UserError(
                f"{learner.name} has objectives of its own phases, which order {order!r} would replace; take it without"
            )
        return replace(learner, rule=Proximal(learner.rule), objective=Implicit(), order=0)
    return replace(learner, order=None, phases=phases)
