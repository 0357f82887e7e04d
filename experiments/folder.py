"""How well does a small network learn new kinds of things from a few pictures, when the pictures are yours?

    python experiments/folder.py --data-root my_images
    python experiments/folder.py --data-root my_images --algorithm protonet --shots 5 --dataset.size 64 --dataset.fit crop
    python experiments/folder.py --data-root my_images --ways 3 --queries 5 --eval-queries 5

`my_images` holds one folder (or is a zip with one folder) for each class, with jpg, png, webp, bmp or gif files of any size. If
it has folders train, val and test instead, these hold the classes of the splits. Otherwise classes are dealt to the splits by a
hash of their names, 64/16/20 % of them but at least --ways for each (`--dataset.shares`, `--dataset.least`), so the classes
of test tasks are never seen in training. Pictures are squashed to 84 x 84 and kept decoded in the cache. Settings are those of
Finn et al. 2017 for mini-ImageNet, but for the shorter training; there is no published number to expect.
"""

from dataclasses import dataclass, replace

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"long": {"iterations": 60_000, "validate_every": 1_000}, "quick": {"iterations": 500, "validate_every": 100}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of the classes of any folder of class folders."""

    sampler: str = "folder"
    """folder, csv-lists, or whatever else gives tasks."""
    model: str = "conv4-32-pool"
    """conv4-32-pool, or one of `toolkit list models`."""
    inner_lr: float = 0.01
    inner_steps: int = 5
    tasks: int = 4
    queries: int = 15
    iterations: int = 5_000
    validate_every: int = 250
    val_tasks: int = 100


def main(config: Config) -> None:
    least = f"least={max(config.ways, config.train_ways or 0)}"
    if config.sampler == "folder" and not any(pair.startswith("least=") for pair in config.dataset_args):
        config = replace(config, dataset_args=(*config.dataset_args, least))  # splits that the tasks fit into
    config, learner, tasks = assemble(config)
    run(config, "folder", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
