"""How well does a small network learn five new kinds of things when even their families are new?

Paper: Oreshkin, Rodriguez, Lacoste, "TADAM", NeurIPS 2018: the FC100 split keeps whole superclasses of CIFAR-100 apart, so that
test classes are less like training classes than in CIFAR-FS. Their own ResNet-12 reaches 40.1 +- 0.4 % (5-way 1-shot) and
56.1 +- 0.4 % (5-shot).

    python experiments/fc100.py --data-root data --download
    python experiments/fc100.py --sampler fc100-30 --algorithm protonet --shots 5 --data-root data

`fc100` has 600 images a class (torchvision's CIFAR-100), `fc100-30` 180, from `cifar100_fewshot.zip`. The network is conv4 with
32 channels and max-pooling; batch statistics (transductive).
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"paper": {"iterations": 60_000}, "quick": {"iterations": 1_000, "validate_every": 250}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of CIFAR-100's classes."""

    sampler: str = "fc100"
    """fc100, fc100-30, or whatever else gives tasks."""
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
    run(config, "fc100", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
