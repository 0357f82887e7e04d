"""Exact, fast MAML-style meta-learning around a shared model: task samplers, inner loop, meta-gradient, adaptation curves."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from toolkit import adapted, algorithms, plugins
    from toolkit.choose import choose
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
    "adapted", "algorithms", "calibrate", "check_sampler", "choose", "draw", "evaluate", "meta_gradient", "plugins", "train",
]  # fmt: skip

# Where each name is at home. They are imported when they are first used, so that `toolkit --help` does not wait for torch.
_HOMES = {
    "choose": "choose", "Curve": "curve", "Metrics": "engine", "meta_gradient": "engine", "UserError": "errors",
    "calibrate": "evaluate", "evaluate": "evaluate", "Learner": "learner", "Meta": "learner", "Outer": "outer", "Plan": "plan",
    "check_sampler": "samplers.check", "Batch": "task", "Task": "task", "TaskSampler": "task", "draw": "task",
    "Record": "train", "State": "train", "train": "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f"toolkit.{_HOMES[name]}"), name)
    elif name in __all__:
        return importlib.import_module(f"toolkit.{name}")
    else:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    globals()[name] = found
    return found


class _Package(ModuleType):
    """Of a function and the module of the same name (`train`, `evaluate`, `choose`), the package shows the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) and name in _HOMES else value)


sys.modules[__name__].__class__ = _Package
