"""Adapted tasks: what is stored of them, how little it is, and a plain module of one."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.conftest import convolutional, named, relative, stirred, task_batch
from toolkit import Batch, Learner, Meta, UserError, adapted, algorithms, files
from toolkit.adapted import adapt, fingerprint, load, merged, names, save
from toolkit.evaluate import calibrate, predictions
from toolkit.models.adapters import Lora
from toolkit.models.surgery import lora
from toolkit.norms import TRANSDUCTIVE
from toolkit.task import Task, take
from toolkit.tree import Params, numel

SHAPE = (1, 8, 8)


def task(i: int = 0) -> Task:
    return take(task_batch(3, SHAPE), i)


def adapters(**more: Any) -> tuple[Learner, Meta]:
    """MAML over low-rank adapters and the head of a convolutional network, all weights stirred."""
    model = lora(convolutional(), 2, "0", peft=False)
    learner = algorithms.maml(model, inner_lr=0.3, inner_steps=2, adapts=("*lora_*", "5.*"), head="5", **more)
    return learner, stirred(learner)


def same(a: Params, b: Params) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_only_what_adapts_is_kept_and_it_is_what_evaluation_walks_to() -> None:
    learner, meta = adapters()
    for steps in (None, 0, 3):
        fast = adapt(learner, meta, task().support, steps)
        assert tuple(fast) == learner.adapted_names and numel(fast) == 2 * 9 + 3 * 2 + 12 * 2 + 2
        shown = predictions(learner, meta, task(), (2 if steps is None else steps,))[0]
        assert torch.equal(learner.predict(meta, fast, task().query.x, k=steps), shown)
        assert not any(t.requires_grad for t in fast.values())


def test_dropout_is_off() -> None:
    model = named(body=nn.Linear(3, 4), drop=nn.Dropout(0.5), head=nn.Linear(4, 2)).train()
    learner = algorithms.maml(model, inner_steps=2)
    support = take(task_batch(), 0).support
    assert same(*(adapt(learner, learner.init(), support) for _ in range(2)))


HEAD, LARGE = {"head.weight": (5, 64), "head.bias": (5,)}, {"wide.lora_A.weight": (16, 512), "wide.lora_B.weight": (512, 16)}


@pytest.mark.parametrize(("shapes", "share"), [(HEAD, 1.03), (LARGE, 1.001)])
def test_a_thousand_tasks_by_name_in_little_more_than_their_adapters(
    shapes: dict[str, tuple[int, ...]], share: float, tmp_path: Path
) -> None:
    """The head of conv4, 1.3 kB, and adapters of 64 kB; and one task is read without the others."""
    generator = torch.Generator().manual_seed(1)
    tasks = {
        f"user {i:04d}": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for i in range(1000)
    }
    save(tmp_path, tasks, "base")
    needed = 4 * 1000 * numel(tasks["user 0000"])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < share * needed
    assert names(tmp_path) == list(tasks)
    before = resident()
    for name in ("user 0007", "user 0999", "user 0000"):
        assert same(load(tmp_path, name, "base"), tasks[name])
    assert resident() - before < 4e6, "of up to 66 MB"


def resident() -> int:
    """Bytes of memory of this process, those of mapped files too."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_fewer_bytes_on_request(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tasks = {f"{i}": {"a": torch.randn(100, 50), "b": torch.randn(7)} for i in range(3)}
    path = save(tmp_path, tasks, "base", dtype)
    found = load(tmp_path, "1", "base")
    assert path.stat().st_size < 1.1 * 3 * 5007 * (2 if dtype else 4)
    assert {n: (p.dtype, p.shape) for n, p in found.items()} == {n: (p.dtype, p.shape) for n, p in tasks["1"].items()}
    assert relative(found, tasks["1"]) < (4e-3 if dtype else 1e-12)
    if dtype == torch.float16:
        with pytest.raises(
            UserError, match=r"^some adapted weights are too large for torch\.float16; store them as torch\.bfl"
        ):
            save(tmp_path, {"large": {"a": torch.tensor([1e6])}}, "base", dtype)


def test_kinds_and_shapes_of_weights_come_back(tmp_path: Path) -> None:
    fast = {
        "half": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "turned": torch.randn(4, 2).T,
    }
    save(tmp_path, {"one": fast, "two": dict(reversed(fast.items()))}, "base")
    assert same(load(tmp_path, "one", "base"), fast) and same(load(tmp_path, "two", "base"), fast)
    double = {"a": torch.randn(3, dtype=torch.float64)}
    save(tmp_path, {"three": double}, "base")
    assert same(load(tmp_path, "three", "base"), double)


def test_tasks_are_added_and_replaced_and_nothing_is_rewritten(tmp_path: Path) -> None:
    learner, meta = adapters()
    base, folder = fingerprint(learner, meta), tmp_path / "deep" / "tasks"
    fasts = [adapt(learner, meta, task(i).support) for i in range(3)]
    first = save(folder, {"a": fasts[0], "b": fasts[1]}, base)
    before = first.read_bytes()
    save(folder, {"c": fasts[2]}, base)
    save(folder, {"a": fasts[2]}, base)
    assert names(folder) == ["a", "b", "c"] and first.read_bytes() == before
    assert same(load(folder, "a", base), fasts[2]) and same(load(folder, "b", base), fasts[1])
    assert len(list(folder.iterdir())) == 3


def test_a_folder_may_be_text_and_is_no_file(tmp_path: Path) -> None:
    fast = {"w": torch.ones(3)}
    save(str(tmp_path / "tasks"), {"a": fast}, "base")
    assert names(str(tmp_path / "tasks")) == ["a"] and same(load(str(tmp_path / "tasks"), "a", "base"), fast)
    (tmp_path / "file").touch()
    for work in (lambda f: save(f, {"a": fast}, "base"), names, lambda f: load(f, "a", "base")):
        with pytest.raises(UserError, match="file is a file; give the folder that holds, or is to hold, adapted tasks"):
            work(tmp_path / "file")


def test_a_crash_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"a": {"w": torch.ones(3)}}, "base")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, {"b": {"w": torch.ones(3)}}, "base")
    (tmp_path / ".shard-000009-x.safetensors.77.tmp").write_bytes(b"half")  # of a process that was killed
    assert names(tmp_path) == ["a"] and len(list(tmp_path.iterdir())) == 2
    save(tmp_path, {"b": {"w": torch.ones(3)}}, "base")
    assert names(tmp_path) == ["a", "b"]


def test_damage_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = {name: {"w": torch.full((8,), value)} for name, value in (("a", 1.0), ("b", 2.0))}
    save(tmp_path, tasks, "base")
    newest = save(tmp_path, {"a": {"w": torch.full((8,), 3.0)}, "c": tasks["b"]}, "base")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1  # the last number of c
    newest.write_bytes(data)
    assert same(load(tmp_path, "a", "base"), {"w": torch.full((8,), 3.0)})
    with pytest.raises(UserError, match=rf"^task 'c' in {newest} does not match its checksum; adapt it again and save it$"):
        load(tmp_path, "c", "base")
    newest.write_bytes(data[:-9])
    assert same(load(tmp_path, "a", "base"), tasks["a"]) and f"skipping {newest}, which is damaged" in caplog.text


def test_what_cannot_be_stored_or_found_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, meta = adapters()
    base, fast = fingerprint(learner, meta), adapt(learner, meta, task().support)
    save(tmp_path, {f"user {i}": fast for i in range(40)}, base)
    with pytest.raises(
        UserError, match=r"holds no adapted task 'usr 7'; did you mean 'user 7'\? it has user 0, .* and 34 more$"
    ):
        load(tmp_path, "usr 7", base)
    with pytest.raises(UserError, match=r"nowhere holds no adapted task 'a'; it has none$"):
        load(tmp_path / "nowhere", "a", base)
    with pytest.raises(UserError, match=r"weights are floating-point numbers, not torch\.int8; give those, or another dtype$"):
        save(tmp_path, {"a": fast}, base, torch.int8)
    for bad in ("", "two\nlines", "\ud800", 3):
        with pytest.raises(UserError, match=r"cannot be the name of a task; give one line of text$"):
            save(tmp_path, {bad: fast}, base)
    with pytest.raises(UserError, match=r"^no tasks to save"):
        save(tmp_path, {}, base)
    wider = fast | {"5.bias": torch.zeros(3)}
    with pytest.raises(
        UserError, match=r"^task 'b' has weights of other names or shapes than 'a'; save them in calls of their own"
    ):
        save(tmp_path, {"a": fast, "b": wider}, base)
    other = fingerprint(learner, meta._replace(params=meta.params | {"0.base_layer.bias": torch.zeros(3)}))
    for call in (lambda: load(tmp_path, "user 1", other), lambda: save(tmp_path, {"a": fast}, other)):
        with pytest.raises(
            UserError, match=r"holds tasks adapted from another base \(fingerprint \w{8}\) than this one \(\w{8}\)"
        ):
            call()
    with monkeypatch.context() as later:
        later.setattr(adapted, "FORMAT", "2")
        save(tmp_path / "later", {"a": fast}, base)
    with pytest.raises(UserError, match="has format 2, this version reads 1; use the version that wrote it"):
        names(tmp_path / "later")
    with pytest.raises(UserError, match=r"^these weights are 5\.bias, but what adapts is 0\.lora_A\.weight, "):
        merged(learner, meta, {"5.bias": fast["5.bias"]})


def test_the_fingerprint_is_of_all_that_does_not_adapt() -> None:
    learner, meta = adapters()
    base = fingerprint(learner, meta)
    assert base == fingerprint(*adapters()) and len(base) == 32
    moved = {name: p + 1 for name, p in meta.params.items()}
    for name in meta.params:
        changed = fingerprint(learner, meta._replace(params=meta.params | {name: moved[name]}))
        assert (changed == base) == (name in learner.adapted_names), name
    still = lora(convolutional(), 2, "0", peft=False)
    still.get_submodule("0.base_layer").requires_grad_(False)
    frozen = algorithms.maml(still, adapts=("*lora_*", "5.*"), head="5")
    now = fingerprint(frozen, frozen.init())
    frozen.model.get_parameter("0.base_layer.weight").data += 1
    assert fingerprint(frozen, frozen.init()) != now, "what is frozen belongs to the base"
    steps, own = with_norms("per_step")
    now, moved = fingerprint(steps, own), {name: p + 1 for name, p in own.learned.items()}
    for name in own.learned:
        changed = fingerprint(steps, own._replace(learned=own.learned | {name: moved[name]}))
        assert (changed != now) == name.startswith("norm"), name
    assert fingerprint(steps, own._replace(stats={name: s + 1 for name, s in own.stats.items()})) != now
    now = fingerprint(learner, meta)
    learner.model.get_buffer("1.running_mean").add_(1)
    assert fingerprint(learner, meta) != now, "and so do buffers"


POLICIES = ("batch", "support", "running", "per_step", "per_step_batch")


def with_norms(policy: str) -> tuple[Learner, Meta]:
    model = lora(convolutional(), 2, "0", peft=False)
    model.get_buffer("1.running_mean").normal_()
    model.get_buffer("1.running_var").uniform_(0.5, 2)
    model.get_buffer("1.num_batches_tracked").add_(1)
    build = algorithms.maml_plus_plus if policy.startswith("per_step") else algorithms.maml
    learner = build(model, inner_lr=0.3, inner_steps=2, adapts=("*lora_*", "1.*", "5.*"), head="5", batch_norm=policy)
    return learner, calibrate(learner, stirred(learner), lambda generator: task(1), 1)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_merged_module_predicts_as_the_learner_does(policy: str, plain: bool) -> None:
    learner, meta = with_norms(policy)
    fast, (support, query) = adapt(learner, meta, task().support), task()
    before = [(t, t.clone()) for t in (*meta.params.values(), *fast.values())]
    state = {name: t.clone() for name, t in learner.model.state_dict().items()}
    expected = replace(learner, training=False).predict(meta, fast, query.x, support.x)
    module = merged(learner, meta, fast, support.x if policy == "support" else None, plain)
    assert relative(module(query.x), expected) < 1e-12
    assert any(isinstance(m, Lora) for m in module.modules()) != plain
    with torch.no_grad():
        assert relative(module(query.x), expected) < 1e-12, "and again: nothing in it has moved"
    alone = torch.cat([module(x) for x in query.x.split(1)])
    assert (relative(alone, expected) < 1e-12) == (policy not in TRANSDUCTIVE), "what transductive means"
    assert all(torch.equal(*pair) for pair in before)
    module.train()(query.x)
    assert all(torch.equal(t, state[name]) for name, t in learner.model.state_dict().items())


def test_weights_of_a_model_of_another_size_are_not_merged() -> None:
    small, large = (algorithms.maml(named(body=nn.Linear(3, h), head=nn.Linear(h, 2))) for h in (4, 6))
    said = r"the adapted weights body.weight have the shape \(4, 3\), but \(6, 3\) in this model"
    with pytest.raises(UserError, match=said):
        merged(large, large.init(), small.init().params)
    bias = algorithms.maml(named(body=nn.Linear(3, 4), head=nn.Linear(4, 2)), adapts="head.bias")
    with pytest.raises(UserError, match=r"head.bias have the shape \(1,\), but \(2,\)"):  # which would be added to both
        merged(bias, bias.init(), {"head.bias": torch.zeros(1)})


def test_a_task_without_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tasks to save, or one without weights; give at least one"):
        save(tmp_path, {"a": {"w": torch.zeros(1)}, "b": {}}, "base")


def test_weights_that_a_layer_makes_of_others_are_merged() -> None:
    """As weight norm does; the learner's own layer stays as it is."""
    torch.manual_seed(1)
    model = lora(
        named(body=parametrizations.weight_norm(nn.Linear(3, 4)), head=nn.Linear(4, 2)).double(), 2, "body", peft=False
    )
    learner = algorithms.maml(model, inner_lr=0.3, inner_steps=2, adapts=("*lora_*", "head.*"))
    meta, (support, query) = stirred(learner), take(task_batch(1), 0)
    fast = adapt(learner, meta, support)
    expected = replace(learner, training=False).predict(meta, fast, query.x)
    module = merged(learner, meta, fast)
    assert type(module.body) is nn.Linear and relative(module(query.x), expected) < 1e-12
    assert relative(replace(learner, training=False).predict(meta, fast, query.x), expected) == 0


def other(name: str, **more: Any) -> Callable[[], Learner]:
    return lambda: getattr(algorithms, name)(convolutional(nn.InstanceNorm2d), head="5", **more)


OTHERS: dict[str, Callable[[], Learner]] = {
    "all adapts": other("maml", inner_lr=0.3, inner_steps=2),
    "the head": other("anil", inner_lr=0.3, inner_steps=2),
    "prototypes": other("protonet"),
    "remembered examples": other("matching_net"),
    "ridge regression": other("r2d2"),
    "context": other("cavia", inner_lr=0.3, inner_steps=2),
    "warps": other("warp_grad", inner_lr=0.3, inner_steps=2),
    "adapters of peft": other("lora_maml", inner_lr=0.3, inner_steps=2),
}


@pytest.mark.parametrize("case", OTHERS)
def test_any_method_is_stored_and_merged(case: str, tmp_path: Path) -> None:
    learner = OTHERS[case]()
    meta, (support, query) = stirred(learner), task()
    base = fingerprint(learner, meta)
    save(tmp_path, {"task": adapt(learner, meta, support)}, base)
    fast = load(tmp_path, "task", base)
    module = merged(learner, meta, fast)
    assert relative(module(query.x), replace(learner, training=False).predict(meta, fast, query.x, support.x)) < 1e-12


def test_tied_weights_stay_tied_and_the_base_is_shared() -> None:
    model = named(one=nn.Linear(3, 3), soft=nn.Tanh(), two=nn.Linear(3, 3), head=nn.Linear(3, 2))
    model.two.weight = model.one.weight
    model.one.bias.requires_grad_(False)
    learner = algorithms.maml(model, adapts=("two.weight", "head.*"), inner_steps=2)
    meta, (support, query) = stirred(learner), take(task_batch(), 0)
    fast = adapt(learner, meta, support)
    module = merged(learner, meta, fast)
    assert module.two.weight is module.one.weight
    assert relative(module(query.x), learner.predict(meta, fast, query.x)) < 1e-12
    assert module.one.bias.data_ptr() == model.one.bias.data_ptr()
    assert module.two.bias.data_ptr() == meta.params["two.bias"].data_ptr(), "the base is not copied"
    assert not module.one.bias.requires_grad and module.two.bias.requires_grad


def test_statistics_that_are_missing() -> None:
    learner, meta = with_norms("support")
    fast = adapt(learner, meta, task().support)
    with pytest.raises(
        UserError, match=r"^batch norm 'support' normalises by the task's support set; give its inputs as support="
    ):
        merged(learner, meta, fast)
    learner, meta = with_norms("per_step")
    with pytest.raises(UserError, match=r"^batch norm 'per_step' has no statistics yet; merge with meta = calibrate"):
        merged(learner, meta._replace(stats={}), adapt(learner, meta, task().support))
    model = convolutional(lambda width: nn.BatchNorm2d(width, track_running_stats=False))
    learner = algorithms.maml(model, batch_norm="support", head="5")
    with pytest.raises(
        UserError, match=r"^batch norm '1' keeps no statistics, so it has no place .* give it track_running_stats="
    ):
        merged(learner, learner.init(), adapt(learner, learner.init(), task().support), task().support.x)


def test_inputs_with_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.head(self.body(x).tanh() + shift)  # type: ignore[no-any-return]

    learner = algorithms.maml(Two().double(), inner_steps=2, adapts="head.*")
    support = take(task_batch(), 0).support
    x = {"x": support.x, "shift": torch.ones(4, 4, dtype=torch.float64)}
    meta = learner.init()
    fast = adapt(learner, meta, Batch(x, support.y))
    assert relative(merged(learner, meta, fast)(**x), learner.predict(meta, fast, x)) < 1e-12
