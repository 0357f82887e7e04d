"""Recorded and compiled functions: the same numbers, a comparison that notices wrong ones, and a run that goes on without."""

import logging
import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils import _pytree as pytree

from tests.conftest import convolutional, dense, relative, task_batch
from toolkit import Learner, Meta, Plan, Task, algorithms, meta_gradient, recorded
from toolkit.engine import _unrolled, gradient_function, in_double, lift_vmap
from toolkit.learner import Score
from toolkit.recorded import Recorder, Recording, record
from toolkit.tape import reads_host


class Casting(nn.Module):
    """A network that has no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.head = dense().float()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.float())  # type: ignore[no-any-return]


class Peeking(nn.Module):
    """A network that looks at the values of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum() > 0 else self.head(2 * x)  # type: ignore[no-any-return]


def eager(own: Learner, meta: Meta, piece: Task) -> tuple[Meta, Score]:
    return _unrolled(own, lift_vmap, meta, piece)


def recorder(function: Callable[..., Any], compiled: bool = False) -> Recorder:
    return Recorder(function, compiled, partial(in_double, eager), lambda out: (out[0], out[1].loss))


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], Recorder]:
    """A recorder whose recordings are wrong by a change of their result."""

    def make(change: Callable[[Any], Any]) -> Recorder:
        def wrong(function: Callable[..., Any], *trees: Any) -> tuple[Recording, Any]:
            leaves, spec = pytree.tree_flatten(trees)
            plain = function(*trees)

            def graph(*leaves: Tensor) -> list[Tensor]:
                return pytree.tree_leaves(change(function(*pytree.tree_unflatten(leaves, spec))))

            return Recording(graph, pytree.tree_structure(plain), leaves), plain

        monkeypatch.setattr(recorded, "written", wrong)
        return recorder(eager)

    return make


def on_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda out: (pytree.tree_map(change, out[0]), out[1])


def in_single(tasks: Task) -> Task:
    return pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, tasks)


PLANS = [Plan("vmap", trace=True), Plan("vmap", chunk=2, trace=True), Plan("loop", trace=True),
         Plan("threads", chunk=2, workers=2, trace=True), Plan("vmap", memory="recompute", trace=True)]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("model", ["dense", "convolutional"])
def test_recorded_plans_give_the_same_gradient_and_the_same_bits_again(model: str, plan: Plan) -> None:
    network, tasks = (dense(), task_batch()) if model == "dense" else (convolutional(), task_batch(shape=(1, 8, 8)))
    learner = algorithms.maml(network, inner_lr=0.3, inner_steps=2)
    meta, moved = learner.init(), pytree.tree_map(lambda t: 1.1 * t, learner.init())
    found = [meta_gradient(learner, point, tasks, plan) for point in (meta, moved, meta)]
    for point, (grads, metrics) in zip((meta, moved), found[:2], strict=True):
        expected, scores = meta_gradient(learner, point, tasks, Plan("loop"))
        assert relative(grads, expected) < 1e-12 and relative(metrics, scores) < 1e-12
    assert relative(found[2], found[0]) == 0


def test_a_recorded_batch_of_another_size_is_recorded_anew() -> None:
    learner = algorithms.maml(dense(), inner_lr=0.3)
    meta = learner.init()
    for tasks in (task_batch(tasks=3), task_batch(tasks=4), task_batch(tasks=4, query=2)):
        grads, _ = meta_gradient(learner, meta, tasks, Plan("vmap", chunk=2, trace=True))
        assert relative(grads, meta_gradient(learner, meta, tasks, Plan("loop"))[0]) < 1e-12


def test_each_set_of_shapes_has_a_recording_of_its_own() -> None:
    learner, own = algorithms.maml(dense()), recorder(eager)
    for tasks in (task_batch(tasks=3), task_batch(tasks=4), task_batch(tasks=3)):
        own.prepare(learner, learner.init(), tasks)
    assert len(own.made) == 2 and all(made is not None for made in own.made.values())


@pytest.mark.parametrize("model", ["float64", "float32", "casting"])
def test_wrong_recordings_are_noticed_and_rounding_is_not(model: str, altered: Any, caplog: pytest.LogCaptureFixture) -> None:
    network = {"float64": dense, "float32": lambda: dense().float(), "casting": Casting}[model]()
    tasks = task_batch() if model == "float64" else in_single(task_batch())
    rounding = {"float64": 1e-12, "float32": 1e-6, "casting": 1e-6}[model]
    wrong = {"float64": 1e-8, "float32": 1e-2, "casting": 0.5}[model]
    learner = algorithms.maml(network)
    before = [p.dtype for p in (*network.parameters(), *learner.model.parameters())]
    meta = learner.init()
    fine = altered(on_gradient(lambda t: t + rounding))
    fine.prepare(learner, meta, tasks)
    assert 0 < relative(fine(learner, meta, tasks), eager(learner, meta, tasks)) < 1e-4
    refused(altered(on_gradient(lambda t: t + wrong)), learner, tasks, caplog)
    assert [p.dtype for p in (*network.parameters(), *learner.model.parameters())] == before, "the check must copy the model"


def test_a_wrong_loss_of_a_recording_is_noticed(altered: Any, caplog: pytest.LogCaptureFixture) -> None:
    wrong = altered(lambda out: (out[0], Score(out[1].loss + 1e-3, out[1].metric)))
    refused(wrong, algorithms.maml(dense()), task_batch(), caplog)


def refused(own: Recorder, learner: Learner, tasks: Task, caplog: pytest.LogCaptureFixture) -> None:
    """The recording is wrong, which costs a warning, and the function itself runs."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "toolkit"):
        own.prepare(learner, learner.init(), tasks)
    assert "recording is refused: its result is off by" in caplog.text and "going on without it" in caplog.text
    assert relative(own(learner, learner.init(), tasks), eager(learner, learner.init(), tasks)) == 0


def test_nan_is_refused_from_a_recording_only_where_the_true_result_is_finite(
    altered: Any, caplog: pytest.LogCaptureFixture
) -> None:
    learner = algorithms.maml(dense())
    meta, tasks = learner.init(), task_batch()
    refused(altered(on_gradient(lambda t: t * torch.nan)), learner, tasks, caplog)
    poisoned = tasks._replace(query=tasks.query._replace(x=tasks.query.x * torch.nan))
    own = altered(lambda out: out)
    own.prepare(learner, meta, poisoned)
    grads, score = own(learner, meta, poisoned)
    assert score.loss.isnan().all() and all(g.isnan().any() for g in grads.params.values())


def test_a_recording_is_compared_once_and_then_used() -> None:
    calls: list[int] = []

    def counted(own: Learner, meta: Meta, piece: Task) -> tuple[Meta, Score]:
        calls.append(1)
        return eager(own, meta, piece)

    learner, own = algorithms.maml(dense()), recorder(counted)
    for _ in range(3):
        own.prepare(learner, learner.init(), task_batch())
        own(learner, learner.init(), task_batch())
    assert len(calls) == 1, "to record, which also says what is right"


def test_what_looks_at_values_is_not_recorded_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    learner, tasks = algorithms.maml(Peeking()), task_batch()
    function, plain = (gradient_function(learner, Plan("loop", trace=trace)) for trace in (True, False))
    with caplog.at_level(logging.WARNING, "toolkit"):
        for _ in range(2):
            assert relative(function(learner.init(), tasks), plain(learner.init(), tasks)) == 0
    assert len(caplog.records) == 1 and "recording failed" in caplog.text and "going on without it" in caplog.text


def test_a_compiler_that_fails_costs_a_warning_and_is_not_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def compiler(*arguments: Any, **options: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no such backend\nand a long trace")

    monkeypatch.setattr(torch, "compile", compiler)
    learner, tasks = algorithms.maml(dense()), task_batch()
    function = gradient_function(learner, Plan("vmap", compile=True))
    with caplog.at_level(logging.WARNING, "toolkit"):
        results = [function(learner.init(), tasks) for _ in range(3)]
    expected = meta_gradient(learner, learner.init(), tasks, Plan("vmap"))
    assert all(relative(result, expected) == 0 for result in results)
    assert len(tried) == 1 and len(caplog.records) == 1
    assert "torch.compile failed (no such backend); going on without it" in caplog.text


def test_a_compiler_that_takes_too_long_is_not_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = recorded.threading.Event()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: lambda *given: done.wait(60))
    monkeypatch.setattr(recorded, "PATIENCE", 0.2)
    monkeypatch.setattr(recorded, "GLANCE", 0.1)
    learner, tasks = algorithms.maml(dense()), task_batch()
    with caplog.at_level(logging.INFO, "toolkit"):
        grads, _ = meta_gradient(learner, learner.init(), tasks, Plan("vmap", compile=True))
    done.set()
    assert relative(grads, meta_gradient(learner, learner.init(), tasks)[0]) < 1e-12
    assert "compiling, 0 s so far" in caplog.text and "torch.compile failed (not done after 0 s)" in caplog.text


@pytest.mark.parametrize("again", [False, True], ids=["once", "each time"])
def test_half_a_file_of_the_compiler_is_made_anew(
    again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that ended while it compiled leaves behind must not keep all later ones from compiling."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    half = tmp_path / "ab" / "cd.main.so"
    half.parent.mkdir()
    half.touch()

    def load(x: Tensor) -> list[Tensor]:
        if half.exists() or again:
            half.touch()
            raise RuntimeError(f"backend='inductor' raised:\nImportError: {half}: file too short")
        return [x + 1]

    monkeypatch.setattr(torch, "compile", lambda *a, **k: load)
    recording = record(lambda x: x + 1, torch.zeros(2))
    if again:
        with pytest.raises(RuntimeError, match="file too short"):
            recorded.compiled(recording)
    else:
        assert torch.equal(recorded.compiled(recording)(torch.zeros(2)), torch.ones(2))
    assert caplog.text.count("is damaged; compiling it anew") == 1


def test_compiled_code_lies_in_our_cache_or_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own place is in the folder for temporary files, and taken as soon as anything is traced."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda graph, **k: graph)
    recording = record(lambda x: x + 1, torch.zeros(2))
    for before, after in ((default_cache_dir(), str(tmp_path / "compiled")), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        recorded.compiled(recording)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == after


def test_a_recording_keeps_what_writes_in_place() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[1:] += x[1:]
        return y * 2

    x = torch.arange(3.0)
    replay = record(function, torch.ones(3))
    assert torch.equal(replay(x), torch.tensor([0.0, 2.0, 4.0])) and torch.equal(replay(x), torch.tensor([0.0, 2.0, 4.0]))


def test_a_tensor_that_is_given_twice_is_two_arguments() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    recording = record(lambda a, b: [a - 3 * b], one, one)
    assert torch.equal(recording(one, two)[0], torch.full((3,), -5.0))


def test_numbers_from_outside_are_read_at_each_replay_and_may_not_be_changed() -> None:
    outside = torch.ones(3)
    recording = record(lambda a: [a * outside + outside], torch.ones(3))
    outside += 1
    assert torch.equal(recording(torch.ones(3))[0], torch.full((3,), 4.0))


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "itself": lambda w, a: w.add_(a),
    "a view": lambda w, a: w[1:].add_(1),
    "a part": lambda w, a: w.__setitem__(0, 3.0),
    "detached": lambda w, a: w.detach().mul_(a),
    "out": lambda w, a: torch.add(a, a, out=w),
    "a list": lambda w, a: torch._foreach_add_([w], [a]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_outside_is_not_changed(change: str) -> None:
    outside = torch.ones(3)

    def function(a: Tensor) -> list[Tensor]:
        CHANGES[change](outside, a)
        return [a * outside]

    with pytest.raises(RuntimeError, match=r"changes a tensor that is not its own"):
        record(function, torch.full((3,), 2.0))
    assert torch.equal(outside, torch.ones(3))


def test_a_number_that_becomes_a_tensor_is_new_in_each_replay() -> None:
    recording = record(lambda a: [torch.tensor([1.0, 2.0]).mul_(a)], torch.tensor(3.0))
    for _ in range(2):
        assert torch.equal(recording(torch.tensor(5.0))[0], torch.tensor([5.0, 10.0]))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: [a[a > 0]],
        lambda a: [a.nonzero()],
        lambda a: [a * float(a.sum())],
        lambda a: [a if (a > 0).all() else -a],
        lambda a: [torch.from_numpy(a.numpy() + 1)],
        lambda a: [a * a.tolist()[0]],
        lambda a: [torch.tensor([a[0], a[1]])],
        lambda a: [torch.as_tensor([a[0], a[1]])],
        lambda a: [a.new_tensor([a[0], 1.0])],
        lambda a: [a * np.asarray(a).sum()],
        lambda a: [a.tensor_split(a.long().abs())[0]],
        lambda a: [a.repeat_interleave(a.long().abs())],
    ],
    ids=[
        "mask",
        "nonzero",
        "number",
        "branch",
        "numpy",
        "list",
        "tensor",
        "as_tensor",
        "new_tensor",
        "asarray",
        "split",
        "repeat",
    ],
)
def test_a_result_that_hangs_on_values_is_no_recording(function: Callable[[Tensor], list[Tensor]]) -> None:
    with pytest.raises(RuntimeError, match="looks at the values of tensors"):
        record(function, torch.tensor([1.0, -1.0]))


def test_attention_that_looks_at_its_mask_is_no_recording() -> None:
    """Torch's fast path asks whether a mask leaves the left out, by an operation that is not marked as one that looks."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval()
    mask = torch.tensor([[False, False, True], [False, True, True]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        encoder(torch.ones(2, 3, 4), src_key_padding_mask=mask)
        with pytest.raises(RuntimeError, match="looks at the values of tensors"):
            record(lambda x, m: [encoder(x, src_key_padding_mask=m)], torch.ones(2, 3, 4), mask)


def test_sizes_that_are_known_are_no_look_at_values() -> None:
    times = torch.tensor([2, 1])
    recording = record(lambda a: [a.repeat_interleave(times, output_size=3), torch.tensor([1.0, 2.0]) * a], torch.ones(2))
    assert torch.equal(recording(torch.tensor([4.0, 5.0]))[0], torch.tensor([4.0, 4.0, 5.0]))
    matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    solved = record(lambda a, b: [torch.linalg.lstsq(a, b).solution], torch.eye(2), torch.ones(2, 1))
    assert torch.allclose(solved(matrix, torch.ones(2, 1))[0], torch.tensor([[0.5], [0.25]]))


def test_what_a_graph_of_kernels_would_read_only_once() -> None:
    outside = torch.ones(())
    assert reads_host(record(lambda a: [a * outside], torch.ones(2)).graph)  # type: ignore[arg-type]
    assert not reads_host(record(lambda a: [a * 2 + torch.tensor(3.0)], torch.ones(2)).graph)  # type: ignore[arg-type]


def test_results_of_several_parts_and_arguments_that_come_back() -> None:
    recording = record(lambda a, b: [*a.sort(), a.split(1)[1], b, torch.arange(2)], torch.tensor([2.0, 1.0]), torch.ones(2))
    found = recording(torch.tensor([1.0, 3.0]), torch.zeros(2))
    expected = [torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([3.0]), torch.zeros(2), torch.arange(2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recording_keeps_no_result_alive() -> None:
    alive: list[weakref.ref[Any]] = []

    def function(a: Tensor) -> list[Tensor]:
        for _ in range(5):
            a = a.sin()
            alive.append(weakref.ref(a.untyped_storage()))
            assert sum(ref() is not None for ref in alive) <= 2
        return [a]

    record(function, torch.ones(3))
    assert len(alive) == 5
