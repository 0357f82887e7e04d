"""The command line: flags that all experiments share, presets, and errors as one sentence."""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from toolkit import algorithms
from toolkit.arguments import preset, undotted
from toolkit.cluster import asked, submit, without
from toolkit.errors import UserError, in_words, plain_output
from toolkit.learner import Learner
from toolkit.metrics import accuracy, cross_entropy
from toolkit.processes import join, leave, said_already, speak
from toolkit.rule_line import parse
from toolkit.rules import Clip
from toolkit.tuning import settings, tuned

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger("toolkit")


@dataclass(frozen=True)
class Flags:
    """Flags that every experiment shares, under the same names."""

    algorithm: str = "maml"
    """Method: one of `toolkit list algorithms`, such as maml, reptile or protonet, or your own: module:NAME or file.py:NAME."""
    sampler: str = ""
    """Where the tasks come from: one of `toolkit list samplers`, a dataset (N-way K-shot episodes of it), or your own as above;
    its settings follow as in --sampler.gap 3."""
    dataset: str | None = None
    """Dataset for a sampler that draws from one: one of `toolkit list datasets` or your own as above, with --dataset.KEY."""
    model: str = "conv4"
    """Network: one of `toolkit list models`, or your own as above, with --model.KEY."""
    shots: int = 1
    """Support examples (per class)."""
    train_shots: int | None = None
    """Support examples (per class) in training; by default as many as --shots."""
    queries: int = 1
    """Query examples (per class) in training."""
    eval_queries: int = 15
    """Query examples (per class) in validation and test."""
    inner_lr: float = 0.4
    """Learning rate of the inner loop."""
    inner_steps: int = 1
    """Inner steps in training and validation; imaml wants many (16 in its paper), methods without inner steps take none."""
    order: str | None = None
    """How the path is differentiated: second, first, truncated:K, annealed:FRACTION, implicit; by default the method's own."""
    rule: str | None = None
    """Inner update in one line, such as "head: sgd 0.4 learned; norm: frozen; *: adam 1e-3"; by default by --inner-lr."""
    inner_batch: int | None = None
    """Support examples per inner step, in turn; all by default."""
    inner_clip: float | None = None
    """Longest inner gradient of a task (Euclidean); longer ones are scaled down."""
    adapts: str | None = None
    """What the inner loop moves, in place of the method's own: patterns for names of parameters, such as "head.*,*.attn.*", and
    the words head, base (neither head nor adapters), norm, bias, lora, prompt, and last:2, the last two blocks and the head."""
    freeze: str | None = None
    """What neither loop moves, named in the same way; base, for example."""
    lora: int | None = None
    """Rank of low-rank adapters that are put into the model; they and the head adapt unless --adapts says otherwise."""
    lora_layers: str = "*"
    """Layers that get them, patterns for their names; by default all that are linear, convolutional or attention, but the
    head."""
    prompts: int | None = None
    """Learned tokens that are put into a vision transformer; they and the head adapt unless --adapts says otherwise."""
    method: tuple[str, ...] = ()
    """Settings that only this method has, such as lam=0.5 (imaml) or rank=8 (lora_maml); also --algorithm.lam 0.5."""
    sampler_args: tuple[str, ...] = ()
    """What --sampler.gap 3 stands for: gap=3."""
    dataset_args: tuple[str, ...] = ()
    """The same for --dataset.KEY."""
    model_args: tuple[str, ...] = ()
    """The same for --model.KEY."""
    logger: tuple[str, ...] = ()
    """Where the rows of metrics.jsonl also go: some of `toolkit list loggers`, or your own as above."""
    pretrained: str | None = None
    """Weights to start from: default (those that the model's library knows, fetched if they are not here yet), or a file."""
    head: str = "head"
    """Name of the model's last linear layer, for the methods that treat it apart."""
    meta_lr: float = 1e-3
    """Learning rate of the outer loop, the peak of its schedule; for reptile about 0.5."""
    meta_optimizer: Literal["adam", "sgd"] | None = None
    """Optimiser of the outer loop; by default the method's own, mostly adam."""
    meta_schedule: Literal["constant", "linear", "cosine"] | None = None
    """Schedule of the outer rate; by default the method's own, mostly constant."""
    meta_clip: float | None = None
    """Longest meta-gradient (Euclidean); longer ones are scaled down."""
    tasks: int = 32
    """Tasks per meta-update (meta-batch)."""
    iterations: int = 60_000
    """Meta-updates."""
    val_tasks: int = 100
    """Validation tasks for choosing the checkpoint."""
    validate_every: int = 500
    """Iterations between validations; each also writes a checkpoint."""
    eval_tasks: int = 600
    """Test tasks."""
    protocol: Literal["papers", "claims"] | None = None
    """Test tasks by purpose, in place of --eval-tasks: papers, 600; claims, 10,000, for differences under half a point."""
    eval_steps: int = 10
    """Inner steps at test time; the curve has a point after each."""
    permutations: int = 1
    """Label orders to average a prediction over at test time."""
    eval_seed: int = 0
    """Seed of the validation and test tasks; keep it, and every run is judged on the same tasks."""
    seed: int = 0
    """Seed of the initial weights and of the training tasks."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    map: Literal["auto", "vmap", "loop", "threads"] = "auto"
    """How tasks are mapped; auto measures some plans on the first tasks and takes the fastest, see `toolkit plan`."""
    budget: str | None = None
    """Memory that a plan may need, such as 8GB; by default three quarters of what is free."""
    chunk: int | None = None
    """Tasks per piece of the meta-batch; smaller needs less memory."""
    memory: Literal["unroll", "recompute"] = "unroll"
    """recompute: memory nearly flat in the number of inner steps, at more time."""
    backend: Literal["toolkit", "learn2learn"] = "toolkit"
    """Whose classes compute the meta-gradient in training (learn2learn: maml, fomaml, anil, meta_sgd)."""
    trace: bool = True
    """Record the operations of the meta-gradient once and replay them, where that is possible and faster."""
    compile: bool = False
    """Compile the meta-gradient: tens of seconds, then faster for small networks."""
    reduce: Literal["fast", "ordered"] = "fast"
    """How processes (torchrun) add their gradients: fast, all at once; ordered, task by task, the same to the last bit for any
    number of processes."""
    shard: bool = False
    """Each process keeps its part of the shared weights and of the optimiser's state only, and gathers them for each step."""
    slurm: str | None = None
    """Hand the run to Slurm: nodes=2,gpus=8,minutes=600,partition=NAME (also processes, cpus, memory_gb, account)."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Train with products in this precision; the gradient is then not exact."""
    out: Path | None = None
    """Run folder; by default results/<experiment>/<name made from the flags>."""
    resume: bool = False
    """Continue the run in the run folder from its newest checkpoint, if there is one."""
    overwrite: bool = False
    """Replace the run in the run folder."""
    debug: bool = False
    """Show the traceback of an error."""
    preset: str = "default"
    """A named set of other flags; single flags still win."""

    @property
    def run_name(self) -> str:
        """The run folder's default name."""
        return f"{self._from}-{self.shots}s-seed{self.seed}"

    @property
    def _from(self) -> str:
        """Method and tasks: the names of files without their folder, and nothing that a folder cannot be called."""
        parts = [self.algorithm, self.sampler, *([self.dataset] if self.dataset else [])]
        return "-".join(re.sub(r"[^\w.]+", "-", Path(part).name.replace(".py:", ":")) for part in parts)


@dataclass(frozen=True)
class EpisodeFlags(Flags):
    """Flags of experiments on N-way K-shot classification."""

    ways: int = 5
    """Classes per task."""
    train_ways: int | None = None
    """Classes per task in training; by default as many as --ways. The model has outputs for the larger number."""
    augment: Literal["none", "crop-flip"] = "none"
    """What happens to the images of training tasks: crop-flip, a random crop after padding by an eighth, and a random flip."""
    support_copies: int = 0
    """Augmented copies of each support image that validation and test tasks get beside it, by crop-flip."""
    batch_norm: str | None = None
    """Batch-norm policy: batch, per_step_batch (both transductive), support, running, per_step; by default the method's own."""
    data_root: Path = Path("data")
    """Folder that holds the data sets, in torchvision's layout."""
    download: bool = False
    """Download the data set into the data root if it is not there."""

    @property
    def run_name(self) -> str:
        return f"{self._from}-{self.ways}w{self.shots}s-seed{self.seed}"


F = TypeVar("F", bound="DataclassInstance")
T = TypeVar("T", bound=Flags)
PROTOCOLS = {"papers": 600, "claims": 10_000}  # test tasks


def build(flags: Flags, model: nn.Module, classes: int | None = None, **given: Any) -> Learner:
    """The learner that the flags ask for; `given` says what the experiment decides, such as `loss`. `classes` is the number of
    training classes, for methods that pretrain on them. Raises UserError for a method or a knob that does not fit."""
    given |= {"inner_lr": flags.inner_lr, "inner_steps": flags.inner_steps, "head": flags.head}
    given |= {"inner_batch": flags.inner_batch} if flags.inner_batch else {}
    given |= {"order": flags.order} if flags.order else {}
    given |= {"batch_norm": flags.batch_norm} if isinstance(flags, EpisodeFlags) and flags.batch_norm else {}
    given |= {"rule": parse(flags.rule)} if flags.rule else {}
    model, adapts = tuned(
        model, flags.algorithm, adapts=flags.adapts, freeze=flags.freeze, rank=flags.lora, layers=flags.lora_layers,
        prompts=flags.prompts, head=flags.head, seed=flags.seed,
    )  # fmt: skip
    given |= {"adapts": adapts} if adapts else {}
    learner = algorithms.build(flags.algorithm, model, classes, **given, **settings(flags.algorithm, flags.method))
    if adapts and learner.adapts != adapts:
        raise UserError(
            f"{learner.name} decides itself what adapts; leave out --adapts, --lora and --prompts, or use another method"
        )
    outer: dict[str, Any] = {"optimizer": flags.meta_optimizer, "schedule": flags.meta_schedule, "clip": flags.meta_clip}
    learner = replace(learner, outer=replace(learner.outer, **{k: v for k, v in outer.items() if v is not None}))
    if learner.outer.optimizer == "sgd" and not flags.meta_optimizer and flags.meta_lr == type(flags)().meta_lr:
        raise UserError(
            f"{learner.name} moves by plain descent, where --meta-lr {flags.meta_lr} is next to nothing; give one, such as 0.5"
        )
    if learner.pretrain:
        # All classes at once, whatever loss the few of a task have.
        whole = replace(learner.pretrain, loss=cross_entropy, metric=accuracy, outer=learner.outer)
        learner = replace(learner, pretrain=whole)
    return replace(learner, rule=Clip(learner.rule, flags.inner_clip)) if flags.inner_clip is not None else learner


def launch(flags_type: type[F], body: Callable[[F], object], presets: dict[str, dict[str, Any]], doc: str) -> None:
    """Parses the command line into `flags_type` and calls `body`. A UserError becomes one sentence and exit code 2."""
    plain_output()
    speak()
    try:
        _launched(flags_type, body, presets, doc)
    finally:
        leave()


def _launched(flags_type: type[F], body: Callable[[F], object], presets: dict[str, dict[str, Any]], doc: str) -> None:
    import tyro

    try:
        join()
        default = replace(flags_type(), **preset(presets, sys.argv[1:]))
        flags = tyro.cli(flags_type, default=default, description=doc, args=undotted(sys.argv[1:]))
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(_say(error) if isinstance(error, UserError) else 130)
    try:
        checked_flags = checked(flags) if isinstance(flags, Flags) else flags
        if getattr(flags, "slurm", None):
            job = submit(without(sys.argv, "--slurm"), asked(flags.slurm))  # type: ignore[attr-defined]
            print(f"job {job.job_id}; what it says: {job.paths.stdout} and {job.paths.stderr.name}")
            return
        body(checked_flags)
    except (UserError, OSError) as error:
        if getattr(flags, "debug", False):
            raise
        sys.exit(_say(error))
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on from the newest checkpoint" if isinstance(flags, Flags) else ""
        print(f"\ninterrupted{advice}", file=sys.stderr)
        sys.exit(130)


def checked(flags: T) -> T:
    """The flags with the test tasks of their protocol. Raises UserError for a number that can never work, and for a device that
    is not there."""
    if flags.protocol:
        asked = PROTOCOLS[flags.protocol]
        if flags.eval_tasks not in (type(flags)().eval_tasks, asked):
            raise UserError(
                f"--protocol {flags.protocol} means {asked:,} test tasks, but --eval-tasks is {flags.eval_tasks}; give one"
            )
        flags = replace(flags, eval_tasks=asked)
    counts = ("tasks", "iterations", "val_tasks", "validate_every", "eval_tasks", "shots", "queries", "eval_queries")
    for name in (
        *counts,
        "permutations",
        *(name for name in ("inner_batch", "train_shots", "train_ways") if getattr(flags, name, None) is not None),
    ):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give at least 1")
    for name in ("inner_steps", "eval_steps"):
        if getattr(flags, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give 0 or more")
    for name in ("inner_lr", "meta_lr"):
        if not 0 < getattr(flags, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give a positive number")
    try:
        torch.empty(0, device=flags.device)
    except (RuntimeError, AssertionError):
        usable = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f"--device {flags.device} is not usable here; use one of: {usable}") from None
    return flags


def _say(error: UserError | OSError) -> int:
    if not said_already(in_words(error)):
        print(f"error: {in_words(error)}", file=sys.stderr)
    return 2
