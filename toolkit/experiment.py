"""The harness of every experiment: flags in; training, validation, checkpoints, test, figures and a run folder out."""

import logging
import math
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

from toolkit import parts, plugins, processes
from toolkit.backend import backend
from toolkit.cost import operations
from toolkit.distributed import Group, fingerprint, here
from toolkit.energy import Energy, counters
from toolkit.engine import switched
from toolkit.errors import UserError
from toolkit.evaluate import calibrate, evaluate
from toolkit.flags import Flags
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan, ordered
from toolkit.rules import Frozen
from toolkit.runs import checkpoint
from toolkit.runs.entry import entered, put_in_line_again, refuse, settle, slurm_job
from toolkit.runs.folder import NOT_HASHED, Run, config_hash, source_hash, write_json
from toolkit.runs.journal import Journal, better, rates
from toolkit.runs.loggers import loggers
from toolkit.runs.summary import Outcome, code_version, command, peak_mb, table
from toolkit.sharded import whole
from toolkit.stopping import stop_signals
from toolkit.task import TaskSampler, draw, move, take
from toolkit.testing import judged
from toolkit.train import Gradient, NoMemory, NotFinite, Record, State, shared, train
from toolkit.tree import numel

log = logging.getLogger("toolkit")


def run(
    flags: Flags,
    experiment: str,
    learner: Learner,
    training: TaskSampler,
    validation: TaskSampler,
    test: TaskSampler,
    chance: float | None = None,
    pretraining: TaskSampler | None = None,
) -> Run:
    """Trains, chooses the checkpoint on validation tasks, tests it on fixed test tasks, and fills the run folder.

    `chance` is the accuracy of guessing; `pretraining` are the tasks of a learner that has a `pretrain`. Returns the finished
    run. Raises UserError for bad flags before anything is computed, and when the loss is no longer finite. Ctrl-C finishes the
    step, saves, says how to resume and exits.
    """
    git = code_version()  # now: the files may change while the run goes on
    config = configuration(flags, experiment, learner)
    group = here(flags.reduce == "ordered", flags.shard, flags.device)
    beside = checkpoint.beside(learner.model)
    group.agree(
        facts(config) | {f"as {name}": " ".join(said) for name, said in beside.items()},
        "start all of them with the same command, on the same code and weights",
    )
    folder = flags.out or Path("results") / experiment / flags.run_name
    for name in flags.logger:
        plugins.resolve(name, "loggers")
    if group.first(lambda: put_in_line_again(folder, config)):
        flags = replace(flags, resume=True, overwrite=False)
    if group.first(lambda: refuse(folder, config, flags.resume, flags.overwrite)):
        log.info("%s is finished already", folder)
        if not group.rank:
            print(table(Run(folder).result))
        return Run(folder)
    learner = parts.on_device(flags.device, learner)
    trainee, source = learner, training
    if learner.pretrain:
        if pretraining is None:
            raise UserError(
                f"{learner.name} pretrains on all training classes, but this experiment has none; use another method"
            )
        trainee, source = parts.on_device(flags.device, learner.pretrain), pretraining
    for each, sampler in ((learner, training), (trainee, source)):
        sample = move(draw(sampler, 1, flags.seed), flags.device)
        each.rehearse(task := take(sample, 0))
        if flags.permutations > 1 and task.support.y.is_floating_point():
            raise UserError(f"--permutations {flags.permutations} needs classes, but these tasks are regression; leave it out")
    group.agree({"task 0 of training": fingerprint(sample)}, "start all of them on the same data and samplers")
    # Measured where nobody else computes, on as many tasks as each gets.
    plan = group.first(lambda: _plan(replace(flags, tasks=-(-flags.tasks // group.size)), folder, trainee, source))
    if group.ordered:
        plan = replace(plan, workers=plan.workers or torch.get_num_threads())
        torch.set_num_threads(1)  # kernels split sums over their threads, and processes have other numbers of them
    gradient = backend(flags.backend)
    # What these refuse is refused before anything is written.
    gradient(trainee, plan)
    shared(trainee, plan, flags.tasks, group, sample)
    job = Job(flags, folder, learner, trainee, training, source, validation, plan, gradient, config_hash(config), beside, group)
    traces = {"git": git, "command": command(flags, experiment)} | ({"processes": group.size} if group.size > 1 else {})
    by = "" if flags.backend == "toolkit" else f", meta-gradient by {flags.backend}, task by task"
    many = f", {group.size} processes" if group.size > 1 else ""
    log.info("%s on %s, %s%s%s", learner.name, flags.sampler, _describe(learner, plan), by, many)
    if changed := switched(trainee, task):
        log.info("%s", changed)
    with ExitStack() as held:  # in which the first process is, for all
        finished = group.first(lambda: held.enter_context(entered(folder, config, flags.resume, flags.overwrite)))
        if not group.rank:
            write_json(folder / "plan.json", asdict(plan))
        outcome = _train(job)
        summary = judged(folder, flags, config, learner, outcome, test, chance, traces, group)

    def say() -> None:
        from toolkit.plots.save import draw_run

        print(table(summary))
        draw_run(folder)
        print(f"run folder: {folder} (summary.json, curve.json, adaptation.png, training.png, ...)")

    group.first(say)  # for which the others wait: one that ends badly takes all with it
    return finished


def configuration(flags: Flags, experiment: str, learner: Learner | None = None) -> dict[str, Any]:
    """The content of config.json: all flags, with the metric and the batch-norm policy that the learner settled on."""
    said = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(flags).items()}
    config = {"experiment": experiment} | slurm_job() | said
    if learner is None:
        return config
    return config | {"metric": learner.metric_name} | ({"batch_norm": learner.batch_norm} if "batch_norm" in config else {})


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal in all processes of a run: its flags, the code, torch."""
    # These make the same numbers (parts in order to the last bit, else up to rounding), but other messages, or another run.
    more = ("shard", "resume", "overwrite")
    own = {f"--{k.replace('_', '-')}": v for k, v in config.items() if k not in NOT_HASHED or k in more}
    return own | {"toolkit code": source_hash(), "torch": torch.__version__}


def _plan(flags: Flags, folder: Path, trainee: Learner, source: TaskSampler) -> Plan:
    """The plan of a run's earlier part, or a new one."""
    kept = parts.kept_plan(folder) if flags.resume else None
    if kept or flags.backend != "toolkit":
        return kept or Plan("loop")
    if flags.reduce == "ordered":
        chunk = flags.chunk or 1
        return ordered(parts.plan(replace(flags, chunk=chunk), trainee, source), chunk)
    return parts.plan(flags, trainee, source)


def _describe(learner: Learner, plan: Plan) -> str:
    params = learner.init().params
    moving = numel(learner.adapted(params))
    return f"{numel(params):,} parameters of which {moving:,} adapt, plan: {plan}" + (
        " (the first iteration takes tens of seconds if it was not compiled before)" if plan.compile else ""
    )


@dataclass(frozen=True)
class Job:
    """A run's training: `trainee` learns on tasks of `source` for `learner`; they differ only where a method pretrains."""

    flags: Flags
    folder: Path
    learner: Learner
    trainee: Learner
    training: TaskSampler
    source: TaskSampler
    validation: TaskSampler
    plan: Plan
    gradient: Gradient
    identity: str
    beside: dict[str, tuple[str, str, str]]
    group: Group

    def handed_over(self, meta: Meta) -> Meta:
        """The learner's own meta-parameters by those of its trainee, with all that evaluation needs."""
        own = self.learner.inherit(meta) if self.learner.pretrain else meta
        return calibrate(self.learner, own, self.training, seed=self.flags.seed)


def _train(job: Job) -> Outcome:
    """Training with validation, checkpoints, progress and metrics; starts from the newest checkpoint if there is one."""
    flags, learner, group = job.flags, job.learner, job.group
    checkpoints = job.folder / "checkpoints"
    best, saved = group.first(lambda: checkpoint.load_newest(checkpoints, job.identity)) or (learner.init(), {})
    checkpoint.check_beside(job.folder, saved, job.beside)
    checkpoint.check_fits(job.folder, saved, job.trainee.init(), source_hash())
    # A checkpoint is read onto the CPU, and training stays on the device of its parameters.
    state = State(saved["iteration"], Meta(**move(saved["meta"], flags.device)), saved["optimizer"]) if saved else None
    selected, judged = saved.get("selected", {}), True
    done, plan = state.iteration if state else 0, job.plan
    energy = Energy(counters(flags.device), saved.get("joules") if saved else 0.0)
    size, seconds = saved.get("metrics_bytes", 0), saved.get("seconds", 0.0)
    file, window = None if group.rank else job.folder / "metrics.jsonl", saved.get("window", ())
    journal = Journal(file, flags.iterations, size, seconds, window=window)
    if not group.rank:  # now, so that they find the journal as it was at the checkpoint
        try:
            journal.loggers = loggers(flags.logger, job.folder, Run(job.folder).config, done)
        except UserError:  # such as a package that is not there; the same command may be given again
            if not (done or flags.resume):
                shutil.rmtree(job.folder)
            raise
    if done:
        log.info("going on after iteration %d", done)

    def save() -> None:
        if not state:
            return
        optimizer = whole(state.optimizer)
        if not group.rank:
            journal.sync()
            content = {"selected": selected, "seconds": journal.seconds, "metrics_bytes": journal.size}
            content |= {"window": journal.window}
            content |= {"iteration": state.iteration, "meta": state.meta._asdict(), "optimizer": optimizer}
            content |= {"joules": energy.joules(), "beside": job.beside, "code": source_hash()}
            checkpoint.save(checkpoints, state.iteration, best, content, job.identity)
            settle(job.folder)

    sizes = flags.iterations, flags.tasks, flags.meta_lr, flags.seed
    records = train(job.trainee, job.source, *sizes, job.plan, state, job.gradient, group)
    quiet = done == flags.iterations or group.rank > 0
    bar = tqdm(total=flags.iterations, initial=done, desc="train", unit="it", disable=quiet)
    with bar, stop_signals() as stopped:
        try:
            for record in records:
                state, judged = record.state, True
                if record.plan != plan:  # memory ran out
                    plan = record.plan
                    if not group.rank:
                        write_json(job.folder / "plan.json", asdict(plan))
                if row := journal.add(record):
                    bar.set_postfix(_shown(row, record, learner, flags.tasks), refresh=False)
                bar.update()
                last = record.iteration == flags.iterations
                if last or record.iteration % flags.validate_every == 0:
                    judged = False
                    journal.flush()
                    own = job.handed_over(record.meta)
                    row = {"iteration": record.iteration} | _validate(job, own, quiet)
                    journal.write(row)
                    if learned := rates(record.meta):
                        journal.write({"iteration": record.iteration} | learned)
                    if better(row, selected, learner.metric_name):
                        selected, best = row, pytree.tree_map(torch.clone, own)
                    judged = True
                    save()
                if group.any(bool(stopped)):
                    save()
                    bar.close()
                    log.info("stopped after iteration %d; the same command with --resume goes on", record.iteration)
                    number = (stopped or [signal.SIGTERM])[0]
                    sys.exit(128 + number if number in (signal.SIGINT, signal.SIGTERM) else 0)
        except (NotFinite, NoMemory, processes.Lost) as error:
            # What stopped all of them alike is saved by the first. Where that one stands alone, it still saves what it has all
            # of; else parts of the optimiser are out of reach, and the newest checkpoint must do. So it must within a
            # validation, which a resume would take for done.
            kept = ""
            if state and judged and (isinstance(error, NotFinite) or not (group.rank or group.sharded)):
                save()
                kept = f"; everything up to iteration {state.iteration} is saved"
            if not isinstance(error, NotFinite):
                kept += "; the same command with --resume goes on from the newest checkpoint"
            raise UserError(f"{error}{kept}") from None
    spent, task = energy.end(), move(take(draw(job.source, 1, flags.seed), 0), flags.device)
    outcome = Outcome(move(best, flags.device), selected, journal.seconds, plan, peak_mb(flags.device))
    counted = operations(job.trainee.at(1.0), task, plan.memory, flags.tasks)
    return replace(outcome, operations=counted, joules=spent, joules_of=energy.names)


def _shown(row: dict[str, float], record: Record, learner: Learner, tasks: int) -> dict[str, str]:
    shown = {"loss": f"{row['loss']:.3f}", "tasks/s": f"{tasks / record.seconds:.0f}"}
    return shown | ({"accuracy": f"{row['metric']:.3f}"} if learner.metric_name == "accuracy" else {})


def _validate(job: Job, meta: Meta, quiet: bool) -> dict[str, float]:
    """The validation row, after the steps of training; after those of the test where there are none and the test takes some."""
    flags, judging = job.flags, parts.judging(job.flags, job.plan)
    later = job.learner.pretrain or not (job.learner.steps or isinstance(job.learner.rule, Frozen))
    steps = flags.eval_steps if later else job.learner.steps
    sizes, trace = (flags.val_tasks, steps, flags.eval_seed, "val"), job.plan.records
    with tqdm(total=flags.val_tasks, desc="validate", unit="task", leave=False, delay=2, disable=quiet) as bar:
        curve = evaluate(
            job.learner, meta, job.validation, *sizes, judging, bar.update, trace=trace, measures={}, group=job.group
        )
    means = {
        "val_loss": curve.mean(curve.loss),
        "val_metric": curve.mean(),
        "val_ci95": curve.ci95(),
        "val_finite": curve.finite(),
    }
    row = {key: float(values[-1]) for key, values in means.items()}
    return {key: value for key, value in row.items() if math.isfinite(value)}
