"""How well does a small network learn five new kinds of things from one colour photograph of each?

Paper: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers", ICLR 2019, table 1, for
CIFAR-FS, 5-way, four blocks: MAML 58.9 +- 1.9 % (1-shot) and 71.5 +- 1.0 % (5-shot), ProtoNet 55.5 +- 0.7 % and 72.0 +- 0.6 %.

    python experiments/cifar_fs.py --data-root data --download
    python experiments/cifar_fs.py --sampler cifar-fs-30 --algorithm protonet --shots 5 --data-root data

`cifar-fs` has 600 images a class (torchvision's CIFAR-100). `cifar-fs-30` has 180, from `cifar100_fewshot.zip`: meta-training
sees 30 % of the images, so its numbers stand apart from the paper's. The network is conv4 with 32 channels and max-pooling, as
MAML's for mini-ImageNet; batch statistics (transductive). Expected numbers and their cost: results/README.md.
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"paper": {"iterations": 60_000}, "quick": {"iterations": 1_000, "validate_every": 250}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of CIFAR-100's classes."""

    sampler: str = "cifar-fs"
    """cifar-fs, cifar-fs-30, or whatever else gives tasks."""
    model: str = "conv4-32-pool"
    """conv4-32-pool, or one of `toolkit list models`."""
    inner_lr: float = 0.1
    inner_steps: int = 3
    tasks: int = 4
    queries: int = 15
    iterations: int = 10_000
    validate_every: int = 500
    val_tasks: int = 200


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "cifar_fs", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
