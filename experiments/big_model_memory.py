"""How much memory does exact MAML over low-rank adapters of a vision transformer need, and how much by cloning the model?

    python experiments/big_model_memory.py

ViT-B/16 (86 million weights, 224 x 224 pixels, drawn at random: memory does not depend on what they are), adapters of rank 8 on
all layers (Hu et al. 2022), the base frozen, 5-way 1-shot with 5 queries a class, 5 inner steps, second order. Each row is one
meta-gradient in a process of its own that may hold `--gib` of memory and no more; what asks for more fails, and the table says
so. learn2learn's MAML gets the same model, once as it is and once with the attention that can be differentiated twice. Written
to results/big_model/memory.json and memory.md; stopped, the same command goes on after the last row.
"""

import contextlib
import io
import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from toolkit import Batch, Learner, Meta, Plan, Task, algorithms, meta_gradient, parts
from toolkit.choose import peak
from toolkit.engine import exact_attention
from toolkit.errors import UserError
from toolkit.files import replace
from toolkit.flags import launch
from toolkit.metrics import cross_entropy
from toolkit.plan import out_of_memory
from toolkit.runs.folder import write_json
from toolkit.task import take
from toolkit.tree import numel
from toolkit.tuning import tuned

WAYS, QUERIES = 5, 5
ROWS = (
    ("toolkit, steps recomputed", 1), ("toolkit, steps recomputed", 4), ("toolkit, graph of all steps", 1),
    ("learn2learn, as it is", 1), ("learn2learn, plain attention", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Memory and time of one meta-gradient around a big model."""

    model: str = "tv:vit_b_16"
    """A model of images."""
    size: int = 224
    """Height and width of its images."""
    rank: int = 8
    """Rank of the adapters."""
    steps: int = 5
    """Inner steps."""
    gib: float = 12.0
    """Memory that a process may hold, in GiB."""
    threads: int = 2
    """Threads of a process."""
    out: Path = Path("results") / "big_model"
    """Where results go."""
    row: int = -1
    """Measure this row and print it, which the script starts by itself."""


def model_of(config: Config) -> nn.Module:
    """The model with a head of five classes, adapters, and all else frozen."""
    given: dict[str, Any] = {"outputs": WAYS, "ways": WAYS, "channels": 3, "size": config.size, "seed": 0}
    given |= {"inputs": (3, config.size, config.size)}
    model, _ = tuned(parts.network(config.model, given), rank=config.rank, freeze="base")
    return model


def tasks_of(config: Config, tasks: int) -> Task:
    """Random images, labels in turn."""
    generator = torch.Generator().manual_seed(0)

    def batch(examples: int) -> Batch:
        x = torch.randn(tasks, examples, 3, config.size, config.size, generator=generator)
        return Batch(x, (torch.arange(examples) % WAYS).repeat(tasks, 1))

    return Task(batch(WAYS), batch(WAYS * QUERIES))


def by_learn2learn(model: nn.Module, config: Config, tasks: Task) -> list[Tensor]:
    """The same meta-gradient by learn2learn's clone of the whole model."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # notices of its dependencies
        warnings.simplefilter("ignore")
        import learn2learn as l2l

    peer = l2l.algorithms.MAML(model, 0.01, allow_nograd=True, allow_unused=True)
    clone, task = peer.clone(), take(tasks, 0)
    for _ in range(config.steps):
        clone.adapt(cross_entropy(clone(task.support.x), task.support.y))
    cross_entropy(clone(task.query.x), task.query.y).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def measured(config: Config) -> dict[str, Any]:
    """One row: seconds, the most memory held beyond that of the model, or why it failed."""
    subject, count = ROWS[config.row]
    torch.set_num_threads(config.threads)
    model, tasks = model_of(config), tasks_of(config, count)
    learner = algorithms.maml(model, adapts=("*lora_*", "head.*"), loss=cross_entropy, inner_lr=0.01, inner_steps=config.steps)
    row: dict[str, Any] = {"subject": subject, "tasks": count}
    limit = int(config.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began, failed = time.perf_counter(), ""

    def work() -> None:
        if subject == "learn2learn, as it is":
            by_learn2learn(model, config, tasks)
        elif subject.startswith("learn2learn"):
            with exact_attention():
                by_learn2learn(model, config, tasks)
        else:
            _by_toolkit(learner, learner.init(), tasks, "recompute" if "recomputed" in subject else "unroll")

    def guarded() -> None:
        nonlocal failed
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            why = " ".join(str(error).split())
            failed = f"needs more than {config.gib:g} GiB" if out_of_memory(error) else why.split(". ")[0]

    held = peak(guarded)
    row |= {"failed": failed} if failed else {"seconds": time.perf_counter() - began, "bytes": held}
    row["adapter bytes"] = 4 * numel(learner.adapted(learner.init().params))
    row["model bytes"] = 4 * sum(p.numel() for p in model.parameters())
    return row


def _by_toolkit(learner: Learner, meta: Meta, tasks: Task, memory: str) -> None:
    grads, _ = meta_gradient(learner, meta, tasks, Plan("loop", memory=memory))  # type: ignore[arg-type]
    if not all(bool(g.isfinite().all()) and bool(g.any()) for g in grads.params.values()):
        raise UserError("the meta-gradient is not finite, or does not reach all adapters")


def main(config: Config) -> None:
    if config.row >= 0:
        print("ROW" + json.dumps(measured(config)))
        return
    settings = {key: getattr(config, key) for key in ("model", "size", "rank", "steps", "gib", "threads")}
    shared, file = [f"--{key}={value}" for key, value in settings.items()], config.out / "memory.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("settings") == settings else []
    config.out.mkdir(parents=True, exist_ok=True)
    for i, (subject, _) in enumerate(tqdm(ROWS, desc="meta-gradients", unit="row")):
        if i < len(rows):
            continue
        done = subprocess.run([sys.executable, __file__, f"--row={i}", *shared], stdout=subprocess.PIPE, text=True)
        if "ROW" not in done.stdout:
            raise UserError(f"the row {subject!r} ended with code {done.returncode}; its reason stands above")
        rows.append(json.loads(done.stdout.split("ROW")[1]))
        write_json(file, {"settings": settings, "rows": rows})
    replace(config.out / "memory.md", table(rows).encode())
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, and what a further task costs."""
    lines = ["| meta-gradient by | tasks | most memory, GiB | seconds |", "|---|---|---|---|"]
    for row in rows:
        cells = row.get("failed") or f"{row['bytes'] / 2**30:.2f} | {row['seconds']:.0f}"
        lines.append(f"| {row['subject']} | {row['tasks']} | {cells}{' | ' if 'failed' in row else ''} |")
    own = {row["tasks"]: row["bytes"] for row in rows if row["subject"] == ROWS[0][0] and "bytes" in row}
    if len(own) > 1:
        least, most = min(own), max(own)
        further = (own[most] - own[least]) / (most - least)
        adapters, model = (rows[0][f"{what} bytes"] / 2**20 for what in ("adapter", "model"))
        lines += [
            "",
            f"A further task costs {further / 2**20:.0f} MiB ({further / own[least]:.2f} of the first); its adapters are "
            f"{adapters:.2f} MiB, the model {model:.0f} MiB.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch(Config, main, {}, __doc__ or "")
