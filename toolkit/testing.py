"""The end of a run: its learner on the test tasks, and what the run folder gets of that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from toolkit import parts
from toolkit.choose import peak
from toolkit.cost import adapting_operations
from toolkit.curve import Curve
from toolkit.distributed import ALONE, Group
from toolkit.evaluate import evaluate, predictions
from toolkit.flags import Flags
from toolkit.learner import Learner, Meta
from toolkit.metrics import is_of_ways
from toolkit.runs.folder import write_json
from toolkit.runs.summary import Outcome, summarise
from toolkit.task import IGNORED, Padded, Task, TaskSampler, draw, move, take

SHOWN_STEPS = (0, 1, 5, 10)
LOOKED_AT = 8  # test tasks, to see their size


def judged(
    folder: Path,
    flags: Flags,
    config: dict[str, Any],
    learner: Learner,
    outcome: Outcome,
    test: TaskSampler,
    chance: float | None,
    traces: dict[str, Any],
    group: Group = ALONE,
) -> dict[str, Any]:
    """Evaluates on the test tasks that the flags ask for, and writes curve.json, example.safetensors and, last, summary.json,
    which is returned. `traces` as in `summarise`. Of a group of processes, all evaluate and the first writes."""
    found: list[Curve] = []
    asked_for = flags.eval_tasks, flags.eval_steps, flags.eval_seed, "test", parts.judging(flags, outcome.plan)

    def work() -> None:
        with tqdm(total=flags.eval_tasks, desc="test", unit="task", disable=group.rank > 0) as bar:
            asked = flags.permutations, outcome.plan.records
            found.append(evaluate(learner, outcome.best, test, *asked_for, bar.update, *asked, group=group))

    held = peak(work, flags.device)
    (curve,) = found
    if group.rank:
        return {}
    looks = draw(test, min(LOOKED_AT, flags.eval_tasks), flags.eval_seed, split="test")
    first = move(take(looks, 0), flags.device)
    write_json(folder / "curve.json", curve.to_json())
    traces = traces | {"sizes": sizes(looks, 1 + getattr(flags, "support_copies", 0))}
    if tensors := example(flags, learner, outcome.best, test):
        from safetensors.torch import save_file

        save_file(tensors, folder / "example.safetensors")
    moves = not torch.equal(*(curve.metric[:, k].nan_to_num() for k in (0, -1)))
    steps = learner.steps or (curve.steps if moves else 0)  # of what was trained without, those of the test
    selection = f"the best on {flags.val_tasks} validation tasks, every {flags.validate_every} iterations"
    summary = summarise(
        config,
        learner,
        curve,
        outcome,
        chance,
        learner.observe(first.support.x).batch_norm,
        held,
        {"selection": selection} | traces,
        adapting_operations(learner, first, steps, outcome.best),
        first.support,
    )
    write_json(folder / "summary.json", summary)
    return summary


def sizes(tasks: Task, copies: int = 1) -> dict[str, int | None]:
    """Ways and shots of a batch of tasks as their support sets show them, of which each example stands there so many times;
    None for what differs from class to class or from task to task, and ways for regression."""
    y = tasks.support.y
    if y.is_floating_point():
        return {"ways": None, "shots": y.shape[1] // copies}
    counts = [labels[labels >= 0].bincount() for labels in y.flatten(1)]
    ways = {len(each) for each in counts}
    shots = {int(n) for each in counts for n in each}
    return {
        "ways": ways.pop() if len(ways) == 1 else None,
        "shots": shots.pop() // copies if len(shots) == 1 else None,
    }


def example(
    flags: Flags, learner: Learner, meta: Meta, test: TaskSampler, index: int = 0, steps: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """One test task with the predictions after these numbers of steps, by default some that tell, for the picture of a task:
    what has a label of it. Empty where inputs have several parts, which have no picture."""
    task = take(draw(test, 1, flags.eval_seed, index, "test"), 0)
    told = sorted({k for k in (*SHOWN_STEPS, learner.steps) if k <= max(flags.eval_steps, learner.steps)})
    steps = tuple(told if steps is None else steps)
    if isinstance(task.support.x, dict) or isinstance(task.query.x, dict):
        return {}
    predicted = predictions(learner, meta, move(task, flags.device), steps)
    tensors: dict[str, torch.Tensor] = {"steps": torch.tensor(steps)}
    for name, (x, y) in zip(("support", "query"), task, strict=True):
        shown = (y != IGNORED).view(len(y), -1).all(1)
        images = x.x if isinstance(x, Padded) else x
        assert isinstance(images, torch.Tensor)
        tensors |= {f"{name}_x": images[shown], f"{name}_y": y[shown]}
    outputs = int(tensors["query_y"].max()) + 1 if is_of_ways(learner.metric) else None
    tensors["predictions"] = predicted[:, shown, :outputs]  # the query set's, which came last
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
