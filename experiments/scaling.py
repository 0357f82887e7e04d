"""How far does sharing tasks over processes carry: on this machine, measured, and on a cluster, from a cost model?

    python experiments/scaling.py --data-root data

Three things are measured with 1, 2, ... processes of one thread: an iteration of each workload, an all-reduce of several sizes,
and the chain of `--reduce ordered`. The workloads' tasks per second on one process give the seconds of a task and of what every
process does (drawing aside, the optimiser); the collectives give alpha, the seconds of a message, and beta, the seconds of a
byte (Hockney 1994), by least squares on relative errors. With them an iteration of T tasks on N processes takes

    ceil(T / N) task + fixed + 2 (N - 1) alpha + 2 (N - 1) / N bytes beta          (a ring all-reduce; Thakur et al. 2005)

and, in order, ceil(T / N) task + fixed + 2 N (alpha + bytes beta). Tasks are shared in whole pieces of the plan, and processes
that are more than the cores take turns. All of it is measured three times in turn, and the medians count. Written to
results/scaling: `scaling.json` with all that was measured and fitted, the table `scaling.md`, and the figure. The lines for a
cluster take alpha and beta from the flags, which are assumptions and not measured here.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from tqdm import tqdm

from toolkit import parts
from toolkit.distributed import Group, here
from toolkit.errors import UserError, unknown
from toolkit.files import replace
from toolkit.flags import EpisodeFlags, launch
from toolkit.plan import Plan
from toolkit.runs.folder import write_json
from toolkit.train import train

WORKLOADS: dict[str, dict[str, Any]] = {
    "conv4": {"sampler": "omniglot-vinyals", "eval_queries": 1, "tasks": 32},
    "minilm-lora": {
        "sampler": "clinc150-wordpieces", "model": "hf:minilm", "lora": 8, "freeze": "base", "inner_lr": 0.1, "inner_steps": 3,
        "queries": 5, "tasks": 4,
    },
}  # fmt: skip
PLANS = {"conv4": Plan("threads", chunk=8, trace=True), "minilm-lora": Plan("loop")}
BYTES = (4_096, 65_536, 1_048_576, 16_777_216)


@dataclass(frozen=True)
class Config:
    """Throughput against the number of processes, measured and predicted."""

    data_root: Path = Path("data")
    """Folder of the data sets."""
    workloads: tuple[str, ...] = ("conv4", "minilm-lora")
    """What is trained: some of conv4, minilm-lora."""
    processes: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of processes, of one thread each."""
    iterations: int = 8
    """Timed iterations of each; the median counts."""
    rounds: int = 3
    """Times that all numbers of processes are measured, one after the other; the median counts."""
    alpha: float = 1.5e-5
    """Seconds of a message in the cluster of the figure (assumed)."""
    gigabytes: float = 20.0
    """Gigabytes a second between two of its processes (assumed)."""
    meta_batch: int = 1024
    """Tasks of a meta-batch there."""
    faster: float = 50.0
    """How many times as fast as a core here one of its devices is (assumed)."""
    out: Path = Path("results") / "scaling"
    """Where results go."""
    worker: bool = False
    """Measure as one of several processes and print it, which the script starts by itself."""


class Costs(NamedTuple):
    """Seconds of a `task` and of what is `fixed` in an iteration, its number of `tasks`, the `bytes` that are added up; seconds
    of a message, `alpha`, and of a byte, `beta`; `cores` that there are for the processes; tasks of a `piece`."""

    task: float
    fixed: float
    tasks: int
    bytes: int
    alpha: float
    beta: float
    cores: float = math.inf
    piece: int = 1

    def seconds(self, processes: int, ordered: bool = False) -> float:
        """One iteration on so many processes."""
        # Each process has `few` pieces, and `longer` of them one more, while the others are done and leave them their cores.
        few, longer = divmod(self.pieces, processes)
        turns = few * max(1.0, processes / self.cores) + (max(1.0, longer / self.cores) if longer else 0.0)
        share = turns * self.piece * self.task
        if ordered:
            talk = 2 * processes * (self.alpha + self.bytes * self.beta) if processes > 1 else 0.0
        else:
            talk = 2 * (processes - 1) * (self.alpha + self.bytes * self.beta / processes)
        return share + self.fixed + talk

    @property
    def pieces(self) -> int:
        return -(-self.tasks // self.piece)

    def speedup(self, processes: int) -> float:
        return self.seconds(1) / self.seconds(processes)

    def pays_until(self) -> int:
        """The most processes of which each still does half of what it could: beyond, the next is better spent elsewhere."""
        able = [n for n in range(1, self.pieces + 1) if self.speedup(n) >= n / 2]
        return max(able)


def fitted(rows: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """alpha and beta of a ring all-reduce from rows (processes, bytes, seconds), neither below 0, by least squares on relative
    errors."""
    from scipy.optimize import nnls

    design = [[2 * (n - 1) / seconds, 2 * (n - 1) / n * size / seconds] for n, size, seconds in rows]
    scale = [max(column) for column in zip(*design, strict=True)]
    found, _ = nnls([[a / s for a, s in zip(row, scale, strict=True)] for row in design], [1.0] * len(rows))
    return float(found[0] / scale[0]), float(found[1] / scale[1])


def measured(config: Config, name: str, group: Group) -> dict[str, Any]:
    """The median seconds of an iteration of a workload, of this group, and the bytes of its meta-parameters."""
    flags = EpisodeFlags(**(WORKLOADS[name] | {"data_root": config.data_root}))
    flags, learner, tasks = parts.assemble(flags)
    found = {"bytes": sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(learner.init()))}
    # Alone also with half of the tasks, which tells a task from what is fixed; in order only where it is another thing.
    sizes = (flags.tasks, flags.tasks // 2) if group.size == 1 else (flags.tasks,)
    for total in sizes:
        records = train(learner, tasks.training, config.iterations + 2, total, 1e-4, plan=PLANS[name], group=group)
        seconds = list(_spans(records))[2:]
        found[f"seconds of {total}"] = statistics.median(seconds)
    return found | {"tasks": flags.tasks}


def _spans(records: Iterator[Any]) -> Iterator[float]:
    began = time.perf_counter()
    for _ in records:
        yield time.perf_counter() - began
        began = time.perf_counter()


def collectives(group: Group) -> list[tuple[int, float]]:
    """The median seconds of an all-reduce, for each size in bytes."""
    found = []
    for size in BYTES:
        tensor, spans = torch.zeros(size // 4), []
        for _ in range(12):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            spans.append(time.perf_counter() - began)
        found.append((size, statistics.median(spans)))
    return found


def work(config: Config) -> None:
    """One of several processes; the first prints what was measured."""
    torch.set_num_threads(1)
    group = here()
    result: dict[str, Any] = {"workloads": {name: measured(config, name, group) for name in config.workloads}}
    result |= {"all-reduce": collectives(group)} if group.size > 1 else {}
    if not group.rank:
        print("RESULT" + json.dumps(result))


def started(config: Config, size: int) -> dict[str, Any]:
    """What `size` processes measure."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    words = ["--worker", "--data-root", str(config.data_root), "--iterations", str(config.iterations)]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *words, "--workloads", *config.workloads],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    output = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise UserError(f"the measurement with {size} processes failed; its reason stands above")
    return json.loads(output[0].split("RESULT")[1])  # type: ignore[no-any-return]


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over the rounds."""
    return pytree.tree_map(lambda *numbers: statistics.median_low(numbers), *rounds)  # type: ignore[no-any-return]


def costs(name: str, found: dict[int, dict[str, Any]], alpha: float, beta: float) -> Costs:
    """The costs of a workload, from what was measured."""
    alone = found[1]["workloads"][name]
    tasks = alone["tasks"]
    whole, half = alone[f"seconds of {tasks}"], alone[f"seconds of {tasks // 2}"]
    task = max(0.0, whole - half) / (tasks - tasks // 2)
    fixed, cores = max(0.0, whole - tasks * task), float(os.cpu_count() or 1)
    return Costs(task, fixed, tasks, alone["bytes"], alpha, beta, cores, PLANS[name].chunk or 1)


def main(config: Config) -> None:
    if config.worker:
        return work(config)
    for name in config.workloads:
        if name not in WORKLOADS:
            raise unknown("workload", name, WORKLOADS)
    if 1 not in config.processes or min(config.processes) < 1 or max(config.processes) < 2:
        raise UserError(f"--processes {config.processes}; give 1, and at least one larger number")
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds}; give 1 or more")
    # In turns, so that what slows the machine down for a while slows all of them.
    turns = tqdm([(turn, size) for turn in range(config.rounds) for size in sorted(config.processes)], desc="measure")
    seen = [(size, started(config, size)) for _, size in turns]
    found = {size: middle([each for n, each in seen if n == size]) for size in sorted(config.processes)}
    talk = [(n, size, seconds) for n, result in found.items() for size, seconds in result.get("all-reduce", ())]
    alpha, beta = fitted(talk)
    made = {name: costs(name, found, alpha, beta) for name in config.workloads}
    cluster = {name: elsewhere(each, config) for name, each in made.items()}
    rows = [
        {"workload": name, "processes": n, "measured": alone / seconds, "predicted": made[name].speedup(n), "seconds": seconds}
        for name in config.workloads
        for alone in [found[1]["workloads"][name][f"seconds of {made[name].tasks}"]]
        for n, result in found.items()
        for seconds in [result["workloads"][name][f"seconds of {made[name].tasks}"]]
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    assumed = {"alpha": config.alpha, "gigabytes a second": config.gigabytes, "times as fast": config.faster}
    fits = {name: each._asdict() | {"pays until": each.pays_until()} for name, each in made.items()}
    there = {name: each._asdict() | {"cores": None, "pays until": each.pays_until()} for name, each in cluster.items()}
    content = {"rows": rows, "all-reduce": talk, "fitted": fits, "assumed": assumed, "cluster": there}
    write_json(config.out / "scaling.json", content)
    replace(config.out / "scaling.md", words(rows, made, cluster, config).encode())
    from toolkit.plots.save import save
    from toolkit.plots.scaling import scaling

    save(scaling(rows, made, cluster), config.out / "scaling")
    print((config.out / "scaling.md").read_text())


def elsewhere(costs: Costs, config: Config) -> Costs:
    """The same work on the assumed cluster."""
    task, fixed = costs.task / config.faster, costs.fixed / config.faster
    there = costs._replace(task=task, fixed=fixed, tasks=config.meta_batch, cores=math.inf, piece=1)
    return there._replace(alpha=config.alpha, beta=1e-9 / config.gigabytes)


def words(rows: Sequence[dict[str, Any]], made: dict[str, Costs], cluster: dict[str, Costs], config: Config) -> str:
    """The table, and in a sentence each what was fitted and where sharing tasks stops to pay."""
    lines = ["| workload | processes | s an iteration | times one process | by the model |", "|---|---|---|---|---|"]
    for row in rows:
        cells = f"{row['seconds']:.3g} | {row['measured']:.2f} | {row['predicted']:.2f}"
        lines.append(f"| {row['workload']} | {row['processes']} | {cells} |")
    first = next(iter(made.values()))
    lines += ["", f"Fitted here: {first.alpha * 1e6:.0f} µs a message, {1e-9 / first.beta if first.beta else 0:.2g} GB/s.", ""]
    for name, each in cluster.items():
        lines.append(
            f"* {name}: {made[name].tasks} tasks of {made[name].task:.3g} s, {each.bytes / 1e6:.3g} MB added up. With devices "
            f"{config.faster:g} times as fast, {config.alpha * 1e6:g} µs a message, {config.gigabytes:g} GB/s and "
            f"{each.tasks} tasks (assumed), processes do at least half of what they could up to {each.pays_until()} of them."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    launch(Config, main, {}, __doc__ or "")
