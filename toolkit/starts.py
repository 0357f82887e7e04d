"""Where a path starts: functions (learner, meta, support) -> fast weights."""

from toolkit.learner import Learner, Meta
from toolkit.task import Batch
from toolkit.tree import Params


def inherited(learner: Learner, meta: Meta, support: Batch) -> Params:
    """The shared weights themselves: what is meta-learned is the start (Finn et al. 2017)."""
    return learner.adapted(meta.params)
