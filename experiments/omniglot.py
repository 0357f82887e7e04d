"""How well does MAML learn a new character from one drawing?

Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, section 5.2 and table 1: 98.7 +- 0.4 % for 5-way
1-shot with its convolutional network, on a random split of its own that resembles `omniglot-vinyals`.

    python experiments/omniglot.py --algorithm maml --ways 5 --shots 1 --data-root data
    python experiments/omniglot.py --sampler omniglot-background --data-root data

Settings are the paper's: four stride-2 blocks of 64 channels, 28x28 images, rotations as new classes, 32 tasks per update,
1 inner step of 0.4, Adam 1e-3, as many queries as shots, batch statistics (transductive). What differs: 15,000 iterations
(paper: 60,000, `--preset paper`), so that it ends within an hour on two CPU cores, and the checkpoint is chosen on validation
tasks. `--preset quick` takes 1,500 iterations. Expected numbers and their cost: results/README.md.
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"paper": {"iterations": 60_000}, "quick": {"iterations": 1_500, "validate_every": 250, "compile": False}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of Omniglot characters."""

    sampler: str = "omniglot-vinyals"
    """omniglot-vinyals (1,028/172/423 characters) or omniglot-background (Lake's background against evaluation alphabets)."""
    model: str = "conv4"
    """conv4 (stride 2, the paper's), conv4-32 (half as wide) or conv4-pool."""
    eval_queries: int = 1
    iterations: int = 15_000
    val_tasks: int = 200
    eval_tasks: int = 1_000
    compile: bool = True


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "omniglot", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
