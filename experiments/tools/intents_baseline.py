"""What do few-shot intents need no training for? Nearest class means on the test tasks of `experiments/intents.py`.

python -m experiments.tools.intents_baseline --data-root data

Three embeddings of a text: the sum that the untrained network of the experiment makes, its plain feature counts, and its counts
weighted by rarity, log(texts / texts that have the feature), in the training domains. Counts are compared by their cosine.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.intents import Config as Intents
from toolkit import Curve, draw, evaluate
from toolkit.data.intents import clinc150
from toolkit.flags import launch
from toolkit.parts import assemble
from toolkit.task import Task, TaskSampler, take

FEATURES = 4096


@dataclass(frozen=True)
class Config:
    """Baselines without training."""

    data_root: Path = Path("data")
    """Folder that holds clinc150.json.gz."""
    eval_seed: int = 1
    """Seed of the test tasks."""
    eval_tasks: int = 600
    """Test tasks."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    print("| embedding | 1-shot | 5-shot |\n| --- | --- | --- |")
    found: dict[str, list[str]] = {"untrained network": [], "feature counts": [], "counts weighted by rarity": []}
    rarity = weights(counts(clinc150("train", config.data_root).items))
    for shots in (1, 5):
        flags = replace(Intents(), algorithm="protonet", shots=shots, data_root=config.data_root, eval_seed=config.eval_seed)
        _, learner, tasks = assemble(flags)
        curve = evaluate(learner, learner.init(), tasks.test, config.eval_tasks, 0, config.eval_seed)
        plain, weighted = (nearest(tasks.test, config, weight) for weight in (torch.ones(FEATURES), rarity))
        for name, score in zip(found, (curve, plain, weighted), strict=True):
            found[name].append(f"{100 * float(score.mean()[0]):.2f} ± {100 * float(score.ci95()[0]):.2f} %")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")


def counts(x: Tensor) -> Tensor:
    """How often each feature is in each text, (texts, length) to (texts, features); feature 0 is filling and left out."""
    found = torch.zeros(len(x), FEATURES).scatter_add_(1, x, torch.ones(x.shape))
    found[:, 0] = 0
    return found


def weights(found: Tensor) -> Tensor:
    """The rarity of each feature in texts of these counts; one that is in none counts as if in one."""
    return torch.log(len(found) / (found > 0).sum(0).clamp(min=1))


def nearest(sampler: TaskSampler, config: Config, weight: Tensor) -> Curve:
    """The accuracy of the class with the most similar mean, over the test tasks."""
    scores = []
    for i in tqdm(range(config.eval_tasks), leave=False):
        task: Task = take(draw(sampler, 1, config.eval_seed, i, "test"), 0)
        assert isinstance(task.support.x, Tensor) and isinstance(task.query.x, Tensor)
        support, query = (torch.nn.functional.normalize(counts(x) * weight) for x in (task.support.x, task.query.x))
        means = torch.stack([support[task.support.y == c].mean(0) for c in task.support.y.unique()])
        guess = (query @ torch.nn.functional.normalize(means).T).argmax(1)
        scores.append((guess == task.query.y).double().mean())
    metric = torch.stack(scores)[:, None]
    return Curve(1 - metric, metric, "accuracy", "")


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
