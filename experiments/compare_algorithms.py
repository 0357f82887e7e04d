"""Every method of the table on the same tasks with the same budget: what does each buy, and what does it cost?

    python experiments/compare_algorithms.py --setting sinusoid --seeds 3
    python experiments/compare_algorithms.py --setting omniglot-5w1s --data-root data
    python experiments/compare_algorithms.py --setting omniglot-20w1s --data-root data
    python experiments/compare_algorithms.py --setting intents-5w1s --seeds 3 --data-root data

Each method is one run of the setting's experiment per seed, in a process of its own, so that its peak memory is its own; its
flags are the setting's and then the method's, below (for intents: its preset in `experiments/big_model_intents.py`), and stand
in its config.json. The same command again goes on where it stopped: finished runs are kept. `--jobs 2` runs two at a time, each
on its share of the cores.

The budget is small (minutes a method, not hours), so this compares early learning; the papers' orderings are for convergence.
Inner rates and steps are the papers' where they fit, and round numbers otherwise; nothing was tuned on test tasks. Results and
what they say: results/README.md.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from toolkit.algorithms import METHODS
from toolkit.errors import UserError, unknown
from toolkit.files import replace
from toolkit.flags import launch
from toolkit.runs.comparison import rows, table
from toolkit.runs.folder import Run, write_json

HERE = Path(__file__).parent
FAMILIES = {
    "MAML and its order": ("maml", "fomaml", "imaml", "reptile", "maml_plus_plus", "maml_plus_plus-batch"),
    "a part adapts": ("anil", "boil", "cavia", "lora_maml"),
    "a learned inner loop": ("meta_sgd", "alfa", "metal", "meta_curvature", "kfo", "warp_grad"),
    "the head by the support set": ("proto_maml", "unicorn_maml", "r2d2", "protonet", "matching_net"),
    "no meta-learning": ("joint", "fine_tune", "linear_probe", "nearest_centroid"),
}
REGRESSION = (
    "maml", "fomaml", "imaml", "reptile", "maml_plus_plus", "anil", "boil", "cavia", "lora_maml", "meta_sgd", "alfa", "metal",
    "meta_curvature", "kfo", "warp_grad", "joint",
)  # fmt: skip
INTENT_FAMILIES = {
    "as it came": ("frozen", "linear_probe", "fine_tune"),
    "meta-learned": ("protonet", "protonet-lora", "anil-lora"),
    "meta-learned, adapters adapt": ("maml-lora", "reptile-lora", "proto_maml-lora"),
}
Options = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """`script` with `common` flags for all methods, and each method's own on top; only these methods are compared, in panels by
    `families`, each with `base`. The script is told its method by `flag`. What draws nothing at random is `seedless` and runs
    once."""

    script: str
    common: Options
    methods: Mapping[str, Options]
    families: Mapping[str, Sequence[str]] = field(default_factory=lambda: FAMILIES)
    base: str = "maml"
    flag: str = "algorithm"
    seedless: Sequence[str] = ()


def intents(ways: int, shots: int, tests: int) -> Setting:
    """A pretrained language model, each method with the budget of its preset; validation tasks of many ways tell more each."""
    names = [name for family in INTENT_FAMILIES.values() for name in family]
    common: Options = {"ways": ways, "shots": shots, "eval_tasks": tests, "tasks": 4 if ways * shots == 5 else 2}
    if ways > 5:
        common |= {"val_tasks": 50, "validate_every": 20}
    once = INTENT_FAMILIES["as it came"]
    return Setting("big_model_intents.py", common, {name: {} for name in names}, INTENT_FAMILIES, "frozen", "preset", once)


SINUSOID = Setting(
    "sinusoid.py",
    {"iterations": 10_000, "inner_lr": 0.01, "inner_steps": 1, "val_tasks": 200, "validate_every": 2_000, "no_compile": True},
    {method: {} for method in REGRESSION}
    | {
        "imaml": {"inner_steps": 10, "inner_lr": 0.05},
        "reptile": {"inner_steps": 5, "inner_lr": 0.02, "inner_batch": 5, "meta_lr": 0.5},
        "maml_plus_plus": {"inner_steps": 3, "meta_clip": 10.0},
        "anil": {"inner_steps": 5, "inner_lr": 0.05},
        "cavia": {"inner_lr": 1.0},
        "lora_maml": {"inner_lr": 0.02, "inner_steps": 5},
    },
)
IMAGES: dict[str, Options] = {method: {} for method in METHODS} | {
    "imaml": {"inner_steps": 8, "inner_lr": 0.1},
    "reptile": {"inner_steps": 5, "inner_lr": 0.05, "train_shots": 5, "inner_batch": 10, "meta_lr": 0.5},
    "maml_plus_plus": {"inner_steps": 3},
    "maml_plus_plus-batch": {"algorithm": "maml_plus_plus", "inner_steps": 3, "batch_norm": "per_step_batch"},
    "cavia": {"inner_steps": 3, "inner_lr": 3.0},
    "proto_maml": {"inner_lr": 0.05},
    "fine_tune": {"inner_lr": 0.05},
}
OMNIGLOT: Options = {
    "model": "conv4-32", "map": "vmap", "iterations": 1_000, "validate_every": 500, "val_tasks": 200, "eval_tasks": 600,
    "no_compile": True,
}  # fmt: skip
SETTINGS = {
    "sinusoid": SINUSOID,
    "omniglot-5w1s": Setting("omniglot.py", OMNIGLOT | {"ways": 5, "tasks": 16}, IMAGES),
    "omniglot-20w1s": Setting(
        "omniglot.py",
        OMNIGLOT
        | {"ways": 20, "tasks": 4, "inner_lr": 0.1, "inner_steps": 3}
        | {"iterations": 300, "validate_every": 150, "val_tasks": 100, "eval_tasks": 300},
        IMAGES,
    ),
    "intents-5w1s": intents(5, 1, 400),
    "intents-5w5s": intents(5, 5, 300),
    "intents-15w1s": intents(15, 1, 200),
    "intents-15w5s": intents(15, 5, 100),
}


@dataclass(frozen=True)
class Config:
    """All methods, same tasks, same budget."""

    setting: str = "sinusoid"
    """sinusoid, omniglot-5w1s or omniglot-20w1s; intents-5w1s, -5w5s, -15w1s or -15w5s."""
    methods: tuple[str, ...] = ()
    """Methods to compare; all of the setting by default."""
    seeds: int = 1
    """Runs per method, with seeds 0, 1, ...; one run of what draws nothing at random."""
    iterations: int | None = None
    """Meta-updates of every method; by default the setting's."""
    jobs: int = 1
    """Runs at a time."""
    device: str = "cpu"
    """Where to compute."""
    data_root: Path = Path("data")
    """Folder that holds the data sets."""
    out: Path | None = None
    """Where the runs, the table and the figure go; by default results/compare-<setting>."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    if config.setting not in SETTINGS:
        raise unknown("setting", config.setting, SETTINGS)
    setting = SETTINGS[config.setting]
    for method in config.methods:
        if method not in setting.methods:
            raise unknown(f"method for {config.setting}", method, setting.methods)
    if min(config.seeds, config.jobs, 1 if config.iterations is None else config.iterations) < 1:
        raise UserError(f"{config.seeds} seeds, {config.jobs} jobs, {config.iterations} iterations; each must be at least 1")
    if setting.script != "sinusoid.py" and not config.data_root.is_dir():
        data = "Omniglot" if setting.script == "omniglot.py" else "clinc150.json.gz"
        raise UserError(f"there is no folder {config.data_root}; give the one that holds {data} with --data-root")
    out = config.out or Path("results") / f"compare-{config.setting}"
    methods = config.methods or tuple(setting.methods)
    seeds = {m: range(1 if m in setting.seedless else config.seeds) for m in methods}
    folders = {(m, seed): out / f"{m}-seed{seed}" for seed in range(config.seeds) for m in methods if seed in seeds[m]}
    iterations = config.iterations or setting.common.get("iterations")
    for folder in folders.values():
        finished = (folder / "summary.json").exists()
        if finished and iterations and Run(folder).config["iterations"] != iterations:
            raise UserError(
                f"{folder} has {Run(folder).config['iterations']} iterations, not {iterations}; use the same --iterations, or "
                "choose another --out"
            )
    wanted = {key: folder for key, folder in folders.items() if not (folder / "summary.json").exists()}
    failed = []
    with (
        tqdm(total=len(folders), initial=len(folders) - len(wanted), desc="runs") as bar,
        ThreadPoolExecutor(config.jobs) as pool,
    ):
        work = {pool.submit(_run, config, setting, *key, folder): key for key, folder in wanted.items()}
        for done in as_completed(work):
            bar.set_postfix_str("{}, seed {}".format(*work[done]))
            bar.update()
            if message := done.result():
                failed.append(f"{work[done][0]}, seed {work[done][1]}: {message}")
                bar.write(f"failed: {failed[-1]}")
    runs = {m: [folders[m, seed] for seed in own] for m, own in seeds.items()}
    complete = {m: [*map(Run, own)] for m, own in runs.items() if all((path / "summary.json").exists() for path in own)}
    if complete:
        _report(config, setting, out, complete)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(wanted)} runs failed ({failed[0]}); their output is in <method>-seed<n>.log in {out}"
        )


def _run(config: Config, setting: Setting, method: str, seed: int, folder: Path) -> str | None:
    """Runs one method to its end, or on from its newest checkpoint; returns the last line of its output if it failed."""
    options = {setting.flag: method} | setting.common | setting.methods[method]
    options |= {"seed": seed, "device": config.device, "out": folder}
    if config.iterations:
        options |= {"iterations": config.iterations, "validate_every": min(config.iterations, 500)}
    if setting.script != "sinusoid.py":
        options["data_root"] = config.data_root
    command = [sys.executable, str(HERE / setting.script), "--resume"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    environment = dict(os.environ)
    if config.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // config.jobs))
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    return None if code == 0 else (log.read_text().strip().splitlines() or ["no output"])[-1]


def _report(config: Config, setting: Setting, out: Path, runs: dict[str, list[Run]]) -> None:
    from toolkit.plots.comparison import comparison
    from toolkit.plots.save import save

    found = rows(runs, setting.base, setting.seedless)
    text = table(found, setting.base)
    write_json(out / "comparison.json", {"setting": config.setting, "rows": found})
    replace(out / "table.md", f"{text}\n".encode())
    tests = runs[next(iter(runs))][0].summary["test"]["tasks"]
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    budgets = {run.config["iterations"] for group in runs.values() for run in group}
    iterations = f"{'up to ' * (len(budgets) > 1)}{max(budgets):,} iterations"
    title = f"{config.setting}: {iterations}, {seeds}, {tests:,} test tasks"
    figures = save(comparison(found, setting.families, title), out / "curves")
    print(text)
    print(json.dumps({"table": str(out / "table.md"), "figure": str(figures[0])}))


if __name__ == "__main__":
    launch(Config, main, {}, __doc__)
