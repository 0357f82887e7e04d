"""What does meta-learning buy on characters of scripts that were never seen?

MAML (Finn et al. 2017) on `glyphs`: characters rendered from the fonts that matplotlib ships, so nothing is downloaded.
Trained on Latin, Greek, Cyrillic, Canadian syllabics and others; tested on Georgian, Arabic, Lao, Tifinagh and Hebrew.

    python experiments/quickstart.py          (`make demo` runs this in a fresh environment)

Expected: 5-way 1-shot accuracy rises from chance (20 %) before one inner step to about 88 % after it, on scripts that
training never saw; one minute of training on two CPU cores.
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot classification of rendered characters."""

    sampler: str = "glyphs"
    """glyphs."""
    model: str = "conv4"
    """conv4 (stride 2), conv4-32 (half as wide) or conv4-pool."""
    inner_steps: int = 1
    tasks: int = 16
    queries: int = 5
    eval_queries: int = 5
    iterations: int = 300
    validate_every: int = 100


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "quickstart", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
