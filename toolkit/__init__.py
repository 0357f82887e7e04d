"""Exact, fast MAML-style meta-learning around a shared model: task samplers, inner loop, meta-gradient, adaptation curves."""

__version__ = "0.1.0"

from toolkit import algorithms, plugins
from toolkit.curve import Curve
from toolkit.engine import Metrics, meta_gradient
from toolkit.errors import UserError
from toolkit.evaluate import calibrate, evaluate
from toolkit.learner import Learner, Meta
from toolkit.outer import Outer
from toolkit.plan import Plan
from toolkit.samplers.check import check_sampler
from toolkit.task import Batch, Task, TaskSampler, draw
from toolkit.train import Record, State, train

__all__ = [
    "Batch", "Curve", "Learner", "Meta", "Metrics", "Outer", "Plan", "Record", "State", "Task", "TaskSampler", "UserError",
    "algorithms", "calibrate", "check_sampler", "draw", "evaluate", "meta_gradient", "plugins", "train",
]  # fmt: skip
