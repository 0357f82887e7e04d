"""How well does a bag of word pieces learn five new intents, of domains it never heard of, from one sentence of each?

Data: Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction" (CLINC150), EMNLP 2019.

    python experiments/intents.py --data-root data
    python experiments/intents.py --algorithm protonet --shots 5 --data-root data

Departures: the paper classifies all 150 intents at once and has no few-shot tasks. Here training, validation and test have
domains of their own (5, 2 and 3 of the 10), and the out-of-scope texts are not used. Nothing is pretrained and nothing
downloaded: words and their character trigrams are hashed into 4,096 features, whose embeddings are all there is to learn.

Expected numbers, and those of nearest class means without any training: results/README.md. On domains this far away,
meta-learning improves the network, and does not reach counts of word pieces that are weighted by their rarity.
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

PRESETS = {"quick": {"iterations": 200, "validate_every": 50, "val_tasks": 100}}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of what people ask an assistant for."""

    sampler: str = "clinc150"
    """clinc150, or whatever else gives tasks."""
    model: str = "bag"
    """bag, or one of `toolkit list models`."""
    inner_lr: float = 3.0
    inner_steps: int = 2
    meta_lr: float = 1e-2
    tasks: int = 4
    queries: int = 10
    iterations: int = 1_000
    validate_every: int = 100
    val_tasks: int = 200


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "intents", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
