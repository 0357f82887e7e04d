"""What does knowledge shared by a few sub-tasks buy on a sub-task that was held out?

A sub-task is an alphabet of Omniglot: ten characters, 20 drawings each, as 10x10 images for the 100-50-10 perceptron `BigModel`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from toolkit.algorithms import maml
from toolkit.data.bank import ClassBank
from toolkit.data.omniglot import omniglot
from toolkit.errors import UserError
from toolkit.evaluate import evaluate
from toolkit.flags import launch
from toolkit.learner import Meta
from toolkit.models import BigModel
from toolkit.samplers import Loaders, MetaTask, joint_epochs
from toolkit.samplers.episodes import as_input
from toolkit.train import train

CLASSES, SIZE = 10, 10  # characters of a sub-task; height and width of an image
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SUBTASK = "omniglot alphabets"


@dataclass(frozen=True)
class Config:
    """Joint training, meta-learning and no learning as starts for a held-out alphabet; a mixture for unknown ones."""

    subtasks: int = 2
    """Alphabets to learn from."""
    held_out: int = 1
    """Held-out alphabets to adapt to, one in each test task."""
    components: int = 4
    """Held-out alphabets in the mixture."""
    shots: int = 5
    """Support examples per class."""
    queries: int = 10
    """Query examples per class."""
    labelled: int = 1
    """Labelled examples per class that choose the mixture's weights."""
    epochs: int = 100
    """Epochs of joint training."""
    batch: int = 20
    """Examples per batch of joint training."""
    joint_lr: float = 1e-3
    """Learning rate of joint training (Adam)."""
    inner_lr: float = 0.1
    """Inner learning rate of MAML in training; at test time every start has the best on validation alphabets."""
    inner_steps: int = 5
    """Inner steps of MAML in training."""
    meta_lr: float = 1e-3
    """Outer learning rate of MAML (Adam)."""
    tasks: int = 8
    """Tasks per meta-update."""
    iterations: int = 3_000
    """Meta-updates."""
    val_tasks: int = 200
    """Validation tasks."""
    eval_tasks: int = 600
    """Test tasks."""
    eval_steps: int = 20
    """Inner steps at test time."""
    trials: int = 300
    """Draws of all supports, labelled examples and queries for the mixture."""
    seed: int = 0
    """Seed of the weights, of the batches and of the training tasks."""
    data_root: Path = Path("data")
    """Folder that holds the data sets, in torchvision's layout."""
    download: bool = False
    """Download the data set into the data root if it is not there."""
    out: Path | None = None
    """Run folder; by default results/shared_model/<name made from the flags>."""
    overwrite: bool = False
    """Replace the run in the run folder."""
    debug: bool = False
    """Show the traceback of an error."""


def sub_tasks(config: Config, split: str, number: int | None = None) -> dict[str, DataLoader[Any]]:
    """The first `number` alphabets of a split, by name, of those with ten characters or more; of each the first ten, by name."""
    bank = omniglot(split, config.data_root, "background", rotations=False, size=SIZE, download=config.download)
    by_alphabet: dict[str, list[str]] = {}
    for name in sorted(bank.names):
        by_alphabet.setdefault(name.split("/")[1], []).append(name)
    fit = {alphabet: names[:CLASSES] for alphabet, names in sorted(by_alphabet.items()) if len(names) >= CLASSES}
    if number is not None and not 1 <= number <= len(fit):
        raise UserError(
            f"{number} alphabets of the {split} split: it has {len(fit)} of {CLASSES} characters; give 1 to {len(fit)}"
        )
    return {alphabet: _loader(config, bank, names) for alphabet, names in list(fit.items())[:number]}


def _loader(config: Config, bank: ClassBank, names: list[str]) -> DataLoader[Any]:
    chosen = bank.select([bank.names.index(name) for name in names])
    labels = torch.arange(CLASSES).repeat_interleave(chosen.sizes)
    return DataLoader(TensorDataset(as_input(chosen.items), labels), config.batch, shuffle=True)


def main(config: Config) -> None:
    began = time.perf_counter()
    learning, validation = sub_tasks(config, "train", config.subtasks), sub_tasks(config, "val")
    test = sub_tasks(config, "test", max(config.held_out, config.components))
    print(list(learning), list(validation), list(test))
    model = BigModel((SIZE * SIZE, 50, CLASSES), config.seed)
    learner = maml(model, inner_lr=config.inner_lr, inner_steps=config.inner_steps)

    def episodes(loaders):
        return Loaders(loaders, config.shots, config.queries, per_class=True, permute=True)

    for e in joint_epochs([MetaTask(l, model) for l in learning.values()], config.epochs, config.joint_lr, config.seed):
        pass
    print("joint", e.losses, time.perf_counter() - began)
    joint = Meta(e.params, {})
    metas = {"random": learner.init(), "joint": joint}
    val = episodes(list(validation.values()))
    tst = episodes(list(test.values()))

    def best(name, meta):
        t = time.perf_counter()
        for rate in RATES:
            c = evaluate(maml(model, inner_lr=rate, inner_steps=5), meta, val, config.val_tasks, config.eval_steps, split="val")
            print(name, rate, [round(100 * float(v), 1) for v in c.mean()[[0, 1, 2, 5, 10, 20]]], end=" | ")
            c = evaluate(
                maml(model, inner_lr=rate, inner_steps=5), meta, tst, config.val_tasks, config.eval_steps, split="test"
            )
            print([round(100 * float(v), 1) for v in c.mean()[[0, 1, 2, 5, 10, 20]]])
        print("eval s", time.perf_counter() - t)

    for n, m in metas.items():
        best(n, m)
    t = time.perf_counter()
    for r in train(learner, episodes(list(learning.values())), config.iterations, config.tasks, config.meta_lr, config.seed):
        if r.iteration in (100, 300, 1000, 2000, 3000, 5000):
            print(r.iteration, r.loss, r.metric, time.perf_counter() - t)
            best("maml", r.meta)


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
