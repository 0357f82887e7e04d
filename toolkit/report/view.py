"""What the page says of a run, read so that a damaged or old folder costs no more than what it lacks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from toolkit.curve import Curve
from toolkit.runs.folder import Run, result_step, size_words

T = TypeVar("T")
Column = list[float | None]
UNREADABLE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
LATER = {"card": "NLL, calibration error", "command": "the command", "selection": "how the checkpoint was selected"}


@dataclass(frozen=True)
class View:
    """A run that can be shown. Columns have one place for each of `steps`; what is missing or no finite number is None."""

    name: str
    path: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    metric: str
    steps: list[int]
    mean: Column
    ci95: Column
    median: Column
    finite: Column
    worst: Column

    @property
    def percent(self) -> bool:
        """Whether the metric is shown in percent."""
        return self.metric == "accuracy"

    @property
    def trained(self) -> int | None:
        """The position in `steps` of the result (`result_step`)."""
        trained = result_step(self.summary)
        reached = [k for k, step in enumerate(self.steps) if trained is not None and step <= trained]
        return reached[-1] if reached else None

    def card(self, key: str) -> float | None:
        """What else was measured, after the steps of training."""
        values = column(mapping(self.summary.get("card")).get(key), len(self.steps))
        return None if self.trained is None else values[self.trained]

    def cost(self, key: str) -> float | None:
        """What the run took, by its name in the summary."""
        return number(mapping(self.summary.get("cost")).get(key))

    def flag(self, key: str) -> Any:
        """A flag of the run, None where it is not known."""
        return self.config.get(key)

    @property
    def method(self) -> str:
        """The name of the algorithm."""
        return str(self.summary.get("algorithm") or self.flag("algorithm") or "unknown")

    @property
    def tasks(self) -> tuple[str, str]:
        """Where the tasks come from, and of what size they are."""
        source = str(self.summary.get("sampler") or self.flag("sampler") or "unknown")
        source += f" of {self.flag('dataset')}" if self.flag("dataset") else ""
        return source, " ".join(size_words(self.config, self.summary))


def read(run: Run, name: str) -> tuple[View | None, str]:
    """The run as the page shows it, and in words what is missing. No View where there is no test result."""
    found, problem = _attempt(run, "summary.json", lambda: run.summary)
    summary = mapping(found)
    test = mapping(summary.get("test"))
    steps = [int(step) for step in map(number, sequence(test.get("steps"))) if step is not None]
    n = len(steps)
    mean = column(test.get("mean"), n)
    if problem or all(value is None for value in mean):
        return None, f"not shown ({problem or 'no test result in summary.json'})"
    config, no_config = _attempt(run, "config.json", lambda: run.config)
    rows, no_rows = _attempt(run, "metrics.jsonl", lambda: [row for row in run.metrics if isinstance(row, dict)])
    worst, no_curve = _attempt(run, "curve.json", lambda: _worst(run.curve, n))
    old = ", ".join(words for key, words in LATER.items() if not summary.get(key))
    problems = {
        "its configuration": no_config,
        "the course of training": no_rows,
        "the single test tasks": no_curve,
        old: old and "of an older version",
    }
    missing = ", ".join(f"{what} ({why})" for what, why in problems.items() if why)
    kept = column(test.get("worst_tenth"), n)
    view = View(
        name=name,
        path=run.path,
        summary=summary,
        config=mapping(config),
        rows=rows or [],
        metric=str(test.get("metric")),
        steps=steps,
        mean=mean,
        ci95=column(test.get("ci95"), n),
        median=column(test.get("median"), n),
        finite=column(test.get("finite"), n),
        worst=kept if any(value is not None for value in kept) else worst or [None] * n,
    )
    return view, f"shown without {missing}" if missing else ""


def mapping(value: Any) -> dict[str, Any]:
    """The value when it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """The value when it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """The value when it is a number below 1e300, which leaves room for sums of some, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def column(value: Any, n: int) -> Column:
    """The value when it is a list of n, what is no number in it as None; else n times None."""
    return [number(v) for v in value] if isinstance(value, list) and len(value) == n else [None] * n


def _worst(curve: Curve, n: int) -> Column:
    if curve.metric.dim() != 2 or curve.metric.shape[1] != n:
        raise ValueError("curve.json does not fit summary.json")
    return column(curve.worst().tolist(), n)


def _attempt(run: Run, name: str, load: Callable[[], T]) -> tuple[T | None, str]:
    """What `load` makes of a file in the run folder, or why it could not."""
    try:
        return load(), ""
    except UNREADABLE:  # UserError is a ValueError
        if not run.path.is_dir():
            return None, "there is no such folder"
        return None, f"{name} is damaged" if (run.path / name).exists() else f"no {name}"
