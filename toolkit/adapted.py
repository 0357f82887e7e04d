"""What a task has learned, kept as its adapted weights alone: kilobytes beside a base that all tasks share.

A folder of shards holds many tasks by name. Each call of `save` adds one shard, a safetensors file that is whole or not there,
and touches no other; a task that is saved again is replaced by its newest. `load` reads one task and nothing else of its file.
`merged` makes a plain module of it, for use without this toolkit.

A shard has one tensor `adapted` (tasks, numbers), a row for each task, all its adapted weights end to end. Its header says the
names, shapes and kinds of these weights, the names of the tasks, a checksum of each row, and the fingerprint of the base.
"""

import copy
import hashlib
import json
import logging
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolkit import files
from toolkit.engine import exact_layers
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.models.adapters import fold
from toolkit.modules import in_evaluation, listed
from toolkit.norms import TRANSDUCTIVE, batch_norms, tracked_instance_norms
from toolkit.starts import inherited
from toolkit.task import Batch, Input
from toolkit.tree import Params, under

log = logging.getLogger("toolkit")
FORMAT = "1"
NUMBERED = re.compile(r"shard-(\d{6})-")


class Shard(NamedTuple):
    """The header of a shard: its file, the fingerprint of the base, the tasks in the order of the rows, a checksum of each, and
    (kind, shape) of each adapted weight by name."""

    path: Path
    base: str
    tasks: list[str]
    sums: list[int]
    kinds: dict[str, tuple[str, list[int]]]


@torch.no_grad()
def adapt(learner: Learner, meta: Meta, support: Batch, steps: int | None = None) -> Params:
    """The adapted weights of one task after `steps` inner steps (the learner's own number by default), in evaluation mode, as
    `evaluate` walks them. Only what adapts is in them."""
    with exact_layers(learner):
        *_, fast = replace(learner, training=False).path(meta, support, steps)
    return learner.adapted(fast)


def fingerprint(learner: Learner, meta: Meta) -> str:
    """Identifies what a prediction depends on beside the adapted weights: all other weights, buffers, and what batch norm has
    of each step. Adapted weights of these shapes fit where it is the same. Reads every weight once: a second or so for 100
    million."""
    state = dict(learner.model.named_parameters()) | dict(learner.model.named_buffers()) | meta.params | meta.stats
    state |= {name: tensor for name, tensor in meta.learned.items() if name.startswith("norm")}
    digest = hashlib.sha256()
    for name in sorted(state.keys() - set(learner.adapted_names)):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _is_name(name: object) -> bool:
    # Half of a surrogate pair is no text that a file can hold.
    return isinstance(name, str) and name.encode(errors="ignore").decode() == name != "" and "\n" not in name


def save(folder: Path | str, tasks: Mapping[str, Params], base: str, dtype: torch.dtype | None = None) -> Path:
    """Adds a shard with the adapted weights of these tasks, by name, to the folder, which is made if need be; `base` is the
    `fingerprint` of what they were adapted from. `dtype`, such as `torch.bfloat16`, stores them in fewer bytes; `load` gives
    them back as they were, but for the rounding. Raises UserError for tasks that differ in the names or shapes of their
    weights, a name that cannot be kept, weights that `dtype` cannot hold, and a folder of another base."""
    from safetensors.torch import save as to_bytes

    if not tasks or not all(tasks.values()):
        raise UserError("no tasks to save, or one without weights; give at least one, as {name: adapted weights}")
    if bad := [name for name in tasks if not _is_name(name)]:
        raise UserError(f"{bad[0]!r} cannot be the name of a task; give one line of text")
    types = {tensor.dtype for fast in tasks.values() for tensor in fast.values()} | ({dtype} if dtype else set())
    if whole := [kind for kind in types if not kind.is_floating_point]:
        raise UserError(f"adapted weights are floating-point numbers, not {whole[0]}; give those, or another dtype")
    kinds = [{n: (str(t.dtype), list(t.shape)) for n, t in fast.items()} for fast in tasks.values()]
    if odd := next((name for name, kind in zip(tasks, kinds, strict=True) if kind != kinds[0]), None):
        raise UserError(
            f"task {odd!r} has weights of other names or shapes than {next(iter(tasks))!r}; save them in calls of their own"
        )
    folder = Path(folder)
    shards = list(_shards(folder))
    for shard in shards:
        _check_base(shard, base)
    rows = torch.stack([torch.cat([fast[n].detach().cpu().flatten() for n in kinds[0]]) for fast in tasks.values()])
    small = rows.to(dtype or rows.dtype)
    if bool((small.isfinite() != rows.isfinite()).any()):
        raise UserError(f"some adapted weights are too large for {dtype}; store them as torch.bfloat16 or as they are")
    header = {
        "format": FORMAT, "base": base, "tasks": "\n".join(tasks), "kinds": json.dumps(kinds[0]),
        "sums": " ".join(f"{zlib.crc32(_bytes(row)):x}" for row in small),
    }  # fmt: skip
    data = to_bytes({"adapted": small}, header | {"seal": _seal(header)})
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(found[1]) for shard in shards if (found := NUMBERED.match(shard.path.name))), default=0) + 1
    # Two processes may come to the same number, but never to the same name.
    path = folder / f"shard-{number:06d}-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    files.replace(path, data)
    return path


def names(folder: Path | str) -> list[str]:
    """The names of the tasks in a folder, oldest first. Only headers are read."""
    return list(dict.fromkeys(name for shard in reversed(list(_shards(Path(folder)))) for name in shard.tasks))


def load(folder: Path | str, name: str, base: str) -> Params:
    """The adapted weights of the task called `name`, on the CPU; `base` is the `fingerprint` of what they are for. Raises
    UserError for a name that is not there, weights of another base, and ones that do not match their checksum."""
    from safetensors import SafetensorError, safe_open

    shard = next((shard for shard in _shards(Path(folder)) if name in shard.tasks), None)
    if shard is None:
        known = names(folder)
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UserError(f"{folder} holds no adapted task {name!r}{hint} it has {listed(known)}")
    _check_base(shard, base)
    index = shard.tasks.index(name)
    try:
        with safe_open(shard.path, "pt") as file:
            row = file.get_slice("adapted")[index : index + 1][0].clone()
    except SafetensorError as error:
        raise UserError(f"{shard.path} is damaged ({error}); adapt {name!r} again and save it") from None
    if zlib.crc32(_bytes(row)) != shard.sums[index]:
        raise UserError(f"task {name!r} in {shard.path} does not match its checksum; adapt it again and save it")
    parts = row.split([math.prod(shape) for _, shape in shard.kinds.values()])
    return {
        n: part.view(shape).to(getattr(torch, kind.removeprefix("torch.")))
        for part, (n, (kind, shape)) in zip(parts, shard.kinds.items(), strict=True)
    }


def _shards(folder: Path) -> Iterator[Shard]:
    """The shards of a folder, newest first; damaged ones are skipped with a warning."""
    from safetensors import SafetensorError, safe_open

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that holds, or is to hold, adapted tasks")
    for path in sorted(folder.glob("shard-*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()
            if header.pop("seal", None) not in (None, _seal(header)):  # of earlier versions, without
                raise ValueError("its header does not match its seal")
            if header["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {header['format']}, this version reads {FORMAT}; use the version that wrote it"
                )
            sums = [int(word, 16) for word in header["sums"].split()]
            yield Shard(path, header["base"], header["tasks"].split("\n"), sums, json.loads(header["kinds"]))
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("skipping %s, which is damaged: %s", path, error)


def _seal(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _check_base(shard: Shard, base: str) -> None:
    if shard.base != base:
        raise UserError(
            f"{shard.path} holds tasks adapted from another base (fingerprint {shard.base[:8]}) than this one ({base[:8]}); "
            "use the weights that they were adapted from, or another folder"
        )


@torch.no_grad()
def merged(learner: Learner, meta: Meta, fast: Params, support: Input | None = None, plain: bool = True) -> nn.Module:
    """A plain module, in evaluation mode, that predicts as `learner` does with the adapted weights `fast` after its last step.
    With `plain`, low-rank adapters are added into the weights of the layers around which they stand. What did not adapt is
    shared with `meta` and the learner's model, not copied.

    Batch norm is part of that. Policy "running" uses the model's own statistics, "per_step" those of the last step. "support"
    uses those of the task's support inputs, which must be given. The others are transductive: the module normalises every
    batch that it gets by that batch, also in evaluation mode, so that its prediction for one input depends on the others, as
    the learner's does. Raises UserError for weights of other names than adapt, and for statistics that are missing.
    """
    if fast.keys() != set(learner.adapted_names):
        raise UserError(f"these weights are {listed(fast)}, but what adapts is {listed(learner.adapted_names)}")
    own = dict(learner.model.named_parameters())
    made = learner.start is not inherited  # of the support set, such as keys for its examples
    if odd := next((name for name in fast if not made and fast[name].shape != own[name].shape), None):
        shapes = f"{tuple(fast[odd].shape)}, but {tuple(own[odd].shape)}"
        raise UserError(f"the adapted weights {odd} have the shape {shapes} in this model; give those of a model like it")
    device = next(iter(meta.params.values())).device
    fast = {name: tensor.to(device) for name, tensor in fast.items()}
    policy, last, weights = learner.batch_norm, learner.steps, meta.params | fast
    if policy.startswith("per_step"):
        weights = weights | under(f"norm{last}/", meta.learned)
    memo: dict[int, object] = {id(buffer): buffer.to(device, copy=True) for buffer in learner.model.buffers()}
    for name, p in learner.model.named_parameters():
        memo[id(p)] = nn.Parameter(weights.get(name, p).detach().to(device), requires_grad=p.requires_grad)
    if script := next((n for n, m in learner.model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None):
        raise UserError(f"the scripted module {script!r} keeps its own weights in every copy; merge one that is not scripted")
    result = in_evaluation(copy.deepcopy(learner.model, memo))
    if norms := batch_norms(result):
        stats = _statistics(learner, meta, fast, support)
        for name in norms:
            for key in ("running_mean", "running_var"):
                if policy in TRANSDUCTIVE or stats:  # without any, torch takes those of the batch
                    setattr(result.get_submodule(name), key, stats.get(f"{name}.{key}".lstrip(".")))
    for norm in tracked_instance_norms(result).values() if policy != "running" else ():
        for key in ("running_mean", "running_var", "track_running_stats"):  # by which the learner does not normalise
            setattr(norm, key, None)
    return fold(result) if plain else result


def _statistics(learner: Learner, meta: Meta, fast: Params, support: Input | None) -> Params:
    """The statistics by which batch norm normalises at the last step; empty where it needs none but the model's own."""
    point = f"point{learner.steps}/"
    if learner.batch_norm == "per_step":
        if not meta.stats:
            raise UserError("batch norm 'per_step' has no statistics yet; merge with meta = calibrate(learner, meta, sampler)")
        return under(point, meta.stats)
    if learner.batch_norm != "support":
        return {}
    if support is None:
        raise UserError("batch norm 'support' normalises by the task's support set; give its inputs as support=")
    if nowhere := [name for name in batch_norms(learner.model) if learner.model.get_submodule(name).running_mean is None]:
        raise UserError(
            f"batch norm {nowhere[0]!r} keeps no statistics, so it has no place for those of the support set; give it "
            "track_running_stats=True"
        )
    with exact_layers(learner):
        return under(point, replace(learner, training=False).observed(meta, fast, support, learner.steps))
