"""How well does a small network tell five unseen ImageNet classes apart, given one or five photographs of each?

Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017, table 1, for
mini-ImageNet, 5-way: MAML 48.70 +- 1.84 % (1-shot) and 63.11 +- 0.92 % (5-shot), by four blocks of 32 filters.

    python experiments/mini_imagenet.py --data-root data
    python experiments/mini_imagenet.py --preset 5-shot --data-root data

The images are ImageNet's and cannot be downloaded here: put them into data/mini-imagenet/images, with the lists train.csv,
val.csv and test.csv of Ravi and Larochelle (ICLR 2017) beside. They are squashed to 84 x 84 by Lanczos, once. All settings are
the paper's (section A.1): inner rate 0.01, 5 steps in training and 10 in test, 4 tasks (2 for 5-shot), 15 queries, batch
statistics (transductive). `--sampler tiered-imagenet` takes tieredImageNet in the same form.
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"5-shot": {"shots": 5, "tasks": 2}, "quick": {"iterations": 1_000, "validate_every": 250}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of ImageNet's classes."""

    sampler: str = "mini-imagenet"
    """mini-imagenet, tiered-imagenet, or whatever else gives tasks."""
    model: str = "conv4-32-pool"
    """conv4-32-pool, or one of `toolkit list models`."""
    inner_lr: float = 0.01
    inner_steps: int = 5
    tasks: int = 4
    queries: int = 15
    iterations: int = 60_000
    validate_every: int = 1_000
    val_tasks: int = 200


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "mini_imagenet", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
