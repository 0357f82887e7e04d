"""Models of other libraries: theirs but for the head, exact to second order as they are, with weights from where they lie."""

import hashlib
import io
import logging
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models

from tests.conftest import relative, task_batch
from toolkit import Batch, Plan, Task, UserError, algorithms, meta_gradient
from toolkit.flags import EpisodeFlags
from toolkit.metrics import cross_entropy
from toolkit.models.headed import Headed, Prepare
from toolkit.models.weights import load, read
from toolkit.models.zoo import timm_model, torchvision_model
from toolkit.modules import cut
from toolkit.parts import assemble, network
from toolkit.plugins import is_code, listing
from toolkit.runs.checkpoint import flatten
from toolkit.task import take

SMALL = "shufflenet_v2_x0_5"  # torchvision's smallest, 0.3 million weights without its classifier
GIVEN = {"inputs": (3, 32, 32), "outputs": 5, "ways": 5, "seed": 3, "channels": 3, "size": 32}
Tensors = dict[str, Tensor]


def tv(name: str = SMALL, **more: Any) -> Headed:
    return torchvision_model(name, **({"outputs": 5, "channels": 3, "size": 32, "seed": 3} | more))


def library(seed: int = 3) -> nn.Module:
    """torchvision's own model, its weights drawn by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.get_model(SMALL)  # type: ignore[no-any-return]


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0))


# What is built.


def test_it_is_the_librarys_model_with_a_new_head() -> None:
    before = torch.get_rng_state()
    model, theirs = tv(), library()
    assert torch.equal(torch.get_rng_state(), before), "the global random state has changed"
    theirs.fc = nn.Identity()
    assert relative(model.body.state_dict(), theirs.state_dict()) == 0
    assert torch.equal(model(images()), model.head(theirs(images())))
    assert model.head.weight.shape == (5, 1024) and not model.head.bias.any()
    bound = (6 / (5 + 1024)) ** 0.5
    assert 0.95 * bound < model.head.weight.abs().max() <= bound, "not Glorot-uniform"
    assert [name for name, _ in model.named_children()] == ["body", "head"]
    assert (model.pretrained_on, model.pretrained_classes) == ("", ())


def test_the_seed_decides_all_weights() -> None:
    first, other = tv(), tv(seed=4)
    assert relative(tv().state_dict(), first.state_dict()) == 0
    assert relative(first.body.state_dict(), other.body.state_dict()) > 1e-3
    assert relative(first.head.weight, other.head.weight) > 0.1


@pytest.mark.parametrize("resize", [0, 48])
def test_images_are_repeated_and_resized_by_the_model(resize: int) -> None:
    model, plain, x = tv(channels=1, resize=resize).eval(), tv().eval(), images(1)
    wide = F.interpolate(x, (48, 48), mode="bilinear") if resize else x
    assert torch.allclose(model(x), plain(wide.repeat(1, 3, 1, 1)), atol=1e-6)
    assert [name for name, _ in model.named_children()] == ["prepare", "body", "head"]


def test_a_model_of_timm_is_built_for_the_images() -> None:
    timm = pytest.importorskip("timm")
    model = timm_model("test_vit", 5, 1, 32, seed=3, depth=2)
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=32, depth=2)
    assert relative(model.body.state_dict(), theirs.state_dict()) == 0
    assert torch.equal(model(images(1)), model.head(theirs(images(1))))
    assert timm_model("test_resnet", 5, 4, 32)(images(4)).shape == (4, 5), "four channels are no trouble to timm"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "efficientnet_b0", "densenet121", "vgg11", "maxvit_t", "mnasnet0_5"])
def test_other_families_end_in_a_head_too(name: str) -> None:
    size = 224 if name == "maxvit_t" else 64
    model = tv(name, size=size)
    assert model(images(3, size)).shape == (4, 5)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000], "a classifier is left"


@pytest.mark.parametrize("name", [f"tv:{SMALL}", "timm:test_resnet", "timm:test_resnet.r160_in1k"])
def test_a_name_with_its_library_in_front_is_a_plug_in(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    made, again = network(name, GIVEN), network(name, GIVEN)
    assert relative(made.state_dict(), again.state_dict()) == 0
    assert isinstance(made, Headed) and made(images()).shape == (4, 5)


def test_a_library_is_no_code_of_its_own() -> None:
    assert not is_code("conv4", "models") and not is_code("tv:resnet18", "models") and not is_code("hf:a/b", "models")
    assert (
        is_code("tv.py:net", "models") and is_code("torchvision.models:resnet18", "models") and is_code("conv4:net", "models")
    )
    assert is_code("tv:resnet18", "samplers")


def test_the_list_names_the_libraries() -> None:
    lines = {plugin.name: plugin.line for plugin in listing("models")}
    assert "tv:resnet18" in lines["tv"] and "timm:vit_tiny_patch16_224" in lines["timm"] and "hf:minilm" in lines["hf"]


# Models as they are, against two derivatives taken by hand.


def class_net(outputs: int, seed: int = 0) -> nn.Module:
    """torchvision's own class, with a few small layers."""
    torch.manual_seed(seed)
    return models.VisionTransformer(32, 16, 2, 2, 16, 24, num_classes=outputs)


class Recurrent(nn.Module):
    """A recurrent layer, and a head on its last state."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.body, self.head = kind(3, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Tokens to scores of tokens by one table, read in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(5, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.table(x).mean(1)).tanh())  # type: ignore[no-any-return]


class TwoInputs(nn.Module):
    """A model of named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, seen: Tensor, heard: Tensor) -> Tensor:
        return self.head((self.left(seen) * self.right(heard)).tanh())  # type: ignore[no-any-return]


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 5))


def tokens(tasks: Task) -> Task:
    return Task(*(Batch((batch.x.abs() * 1e4).long() % 5, batch.y) for batch in tasks))


def two(tasks: Task) -> Task:
    return Task(*(Batch({"seen": batch.x[..., :3], "heard": batch.x[..., 3:]}, batch.y) for batch in tasks))


def few_layers() -> nn.Module:
    pytest.importorskip("timm")
    return timm_model("test_vit", 5, 3, 32, depth=1)


def prepared() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten())
    layers = {"prepare": Prepare(True, 12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), "body": body, "head": nn.Linear(400, 5)}
    return Headed(OrderedDict(layers))


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    plan: Plan = Plan("vmap")
    change: Callable[[Task], Task] = lambda tasks: tasks
    steps: int = 2
    tasks: int = 2


LOOP = Plan("loop")
CASES = {
    "tv:resnet18": Case(lambda: tv("resnet18"), (3, 32, 32), LOOP, steps=1, tasks=1),
    "tv, vmap": Case(tv, (3, 48, 48), steps=1),
    "grey, resized and normalised": Case(prepared, (1, 8, 8)),
    "module:attr, attention": Case(lambda: network("tests.test_zoo:class_net", GIVEN), (3, 32, 32)),
    "module:attr, attention, loop": Case(lambda: network("tests.test_zoo:class_net", GIVEN), (3, 32, 32), LOOP),
    "timm, attention": Case(few_layers, (3, 32, 32)),
    "dropout": Case(dropping, (3,), LOOP),
    "gru": Case(lambda: Recurrent(nn.GRU), (4, 3), LOOP),
    "lstm": Case(lambda: Recurrent(nn.LSTM), (4, 3), LOOP),
    "tied weights": Case(Tied, (3,), change=tokens),
    "dict inputs": Case(TwoInputs, (7,), change=two),
}


def by_hand(
    model: nn.Module, tasks: Task, steps: int, lr: float, names: tuple[str, ...] | None = None, twice: bool = True
) -> Tensors:
    """The meta-gradient of MAML by torch.autograd alone: a loop over tasks and steps, each inner gradient with its graph."""
    start = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.zeros((), dtype=torch.float64)

    def loss(fast: Tensors, batch: Batch) -> Tensor:
        state = {name: buffer.clone() for name, buffer in model.named_buffers()} | start | fast
        given: Any = ((), batch.x) if isinstance(batch.x, dict) else ((batch.x,), {})
        return cross_entropy(functional_call(model, state, *given), batch.y)

    count = len(tasks.support.y)
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(count):
            task, fast = take(tasks, i), {name: p for name, p in start.items() if names is None or name in names}
            for _ in range(steps):  # without the graph of the inner gradient the result is of first order
                slopes = torch.autograd.grad(loss(fast, task.support), list(fast.values()), create_graph=twice)
                fast = {name: p - lr * slope for (name, p), slope in zip(fast.items(), slopes, strict=True)}
            total = total + loss(fast, task.query) / count
    return dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "tv, vmap")) for name in CASES])
def test_the_meta_gradient_is_exact_through_unmodified_models(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model().double()
    tasks = case.change(task_batch(case.tasks, case.shape, support=6, query=6, ways=5))
    learner = algorithms.maml(model, inner_lr=0.05, inner_steps=case.steps)
    torch.manual_seed(1)  # of the masks of dropout
    truth = by_hand(model, tasks, case.steps, 0.05)
    torch.manual_seed(1)
    grads, _ = meta_gradient(learner, learner.init(), tasks, case.plan)
    assert grads.params.keys() == truth.keys()
    assert relative(grads.params, truth) < 1e-9
    torch.manual_seed(1)
    assert relative(by_hand(model, tasks, case.steps, 0.05, twice=False), truth) > 1e-6, "second derivatives play no part"


def test_a_body_that_does_not_adapt_runs_once_per_task_and_exactly() -> None:
    model, head = prepared().double(), ("head.weight", "head.bias")
    front, back = cut(model, head) or pytest.fail("it was not cut")
    assert [name for name, _ in back.named_parameters()] == list(head) and isinstance(back.prepare, nn.Identity)
    assert isinstance(front.head, nn.Identity) and isinstance(front.prepare, Prepare)
    tasks, learner = task_batch(2, (1, 8, 8), 6, 6, ways=5), algorithms.anil(model, inner_lr=0.1, inner_steps=2)
    assert learner.adapted_names == head
    grads, _ = meta_gradient(learner, learner.init(), tasks, LOOP)
    assert relative(grads.params, by_hand(model, tasks, 2, 0.1, head)) < 1e-9


@pytest.mark.parametrize("method", ["boil", "proto_maml", "protonet", "matching_net", "r2d2", "linear_probe", "fine_tune"])
def test_methods_of_the_head_take_it_as_it_is(method: str) -> None:
    learner = algorithms.build(method, tv(), 10, inner_lr=0.1)
    task = take(task_batch(1, (3, 32, 32), 5, 5, ways=5), 0)
    support, query = (Batch(batch.x.float(), torch.arange(5)) for batch in task)
    meta = learner.init()
    *_, fast = learner.path(meta, support, 1)
    assert learner.predict(meta, fast, query.x, support.x).isfinite().all()


# Weights: of the library.


class Server(ThreadingHTTPServer):
    """Hands out `files` by their names and counts how often it is asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path.removeprefix("/"), b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@cache
def content() -> tuple[bytes, str]:
    """A state dict of torchvision's model as a file, and the name that its checksum gives it."""
    buffer = io.BytesIO()
    torch.save(library(9).state_dict(), buffer)
    return buffer.getvalue(), f"small-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """torch hub in an empty folder, and the default weights of the model on a server of ours."""
    data, name = content()
    server = Server({name: data})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(models.get_model_weights(SMALL).DEFAULT.value, "url", f"{server.url}/{name}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_default_weights_are_fetched_once_and_images_normalised(hub: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    theirs = library(9)
    theirs.fc = nn.Identity()
    model, again = tv(pretrained="default").eval(), tv(pretrained="default").eval()
    assert len(hub.asked) == 1, "it was fetched twice"
    assert relative(model.body.state_dict(), theirs.state_dict()) == 0
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(model(images()), model.head(theirs.eval()((images() - mean) / std)), atol=1e-6)
    assert torch.equal(model(images()), again(images()))
    assert model.pretrained_on == "ImageNet-1k (torchvision IMAGENET1K_V1)"
    assert len(model.pretrained_classes) == 1000 and "goldfish" in model.pretrained_classes
    assert (
        f"tv:{SMALL} starts from weights of ImageNet-1k (torchvision IMAGENET1K_V1); images are normalised by mean 0.485, "
        in (caplog.text)
    )
    plain = tv(pretrained="default", normalise="no").eval()
    assert torch.allclose(plain(images()), plain.head(theirs(images())), atol=1e-6)


def test_a_file_of_another_checksum_is_refused(hub: Server, tmp_path: Path) -> None:
    data, name = content()
    hub.files[name] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(
        UserError, match=rf"cannot be fetched \(invalid hash value .*; put {name} from http.* into .*checkpoints"
    ):
        tv(pretrained="default")
    assert not list((tmp_path / "hub").rglob("*.pth*")), "it was kept"
    place = tmp_path / "hub" / "checkpoints" / name
    place.write_bytes(data[:-9])
    with pytest.raises(UserError, match=rf"{name} is damaged: its SHA-256 does not begin with [0-9a-f]{{8}}; delete it"):
        tv(pretrained="default")
    place.write_bytes(data)
    hub.asked.clear()
    assert tv(pretrained="default").pretrained_on and not hub.asked, "a file put there by hand is not taken"


def test_without_a_network_the_sentence_says_which_file_goes_where(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://127.0.0.1:1/small-01234567.pth"  # nobody listens there
    monkeypatch.setattr(models.get_model_weights(SMALL).DEFAULT.value, "url", url)
    place = re.escape(str(tmp_path / "hub" / "checkpoints"))
    with pytest.raises(
        UserError, match=rf"cannot be fetched .*; put small-01234567\.pth from {url} into {place}, or give it as"
    ):
        tv(pretrained="default")


def test_timm_takes_its_weights_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = rf"are not in {re.escape(str(tmp_path))}; fetch model.safetensors of timm/test_resnet.r160_in1k from Hugging Face"
    with pytest.raises(UserError, match=said):
        timm_model("test_resnet", 5, 3, 32, pretrained="default")
    torch.manual_seed(9)
    theirs = timm.create_model("test_resnet")
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(theirs.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    model = timm_model("test_resnet", 5, 1, 32, pretrained="default")
    theirs.reset_classifier(0)
    assert relative(model.body.state_dict(), theirs.state_dict()) == 0
    assert model.pretrained_on == "ImageNet-1k (timm timm/test_resnet.r160_in1k)"
    assert {"tench", "n01440764"} <= set(model.pretrained_classes)
    assert torch.equal(model.prepare(images(1)), (images(1).repeat(1, 3, 1, 1) - 0.5) / 0.5)


# Weights: of a file.


def written(path: Path, tensors: Any) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_a_file_with_the_librarys_names_fills_the_body(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    model = tv(pretrained=written(tmp_path / name, library(9).state_dict()))
    theirs = library(9)
    theirs.fc = nn.Identity()
    assert relative(model.body.state_dict(), theirs.state_dict()) == 0
    assert relative(model.head.state_dict(), tv().head.state_dict()) == 0, "the head is not new"
    assert model.pretrained_on == f"file {name}" and model.pretrained_classes == () and model.prepare.mean is not None
    assert caplog.text.count("has other outputs and is left out; the head is new") == 1


def test_a_file_of_the_librarys_own_is_known_by_its_content_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    entry = models.get_model_weights(SMALL).DEFAULT
    name = entry.url.rpartition("/")[2]
    pretending = tv(pretrained=written(tmp_path / name, library(9).state_dict()))
    assert pretending.pretrained_on == f"file {name}" and pretending.pretrained_classes == ()
    assert "which classes it was trained on is not known, so none is warned of" in caplog.text
    caplog.clear()
    data, name = content()
    monkeypatch.setattr(entry.value, "url", f"https://nowhere/{name}")
    (tmp_path / "renamed.pth").write_bytes(data)
    model = tv(pretrained=str(tmp_path / "renamed.pth"))
    assert model.pretrained_on == "file renamed.pth: ImageNet-1k (torchvision IMAGENET1K_V1)"
    assert model.pretrained_classes == tuple(entry.meta["categories"]) and "is not known" not in caplog.text


def test_a_classifier_of_the_same_width_becomes_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    theirs = library(9)
    theirs.fc = nn.Linear(1024, 5)
    wrapped = {"epoch": 3, "state_dict": theirs.state_dict()}
    model = tv(pretrained=written(tmp_path / "w.pth", wrapped), normalise="no")
    assert torch.equal(model.eval()(images()), theirs.eval()(images()))
    assert "left out" not in caplog.text


def test_a_checkpoint_of_a_run_and_a_state_dict_of_ours_come_back(tmp_path: Path) -> None:
    model = tv(seed=8)
    meta = algorithms.maml(model, inner_lr=0.1).init()
    run = tv(pretrained=written(tmp_path / "weights.safetensors", flatten(meta)))
    assert relative(dict(run.named_parameters()), dict(model.named_parameters())) == 0
    assert [name for name, _ in run.named_children()] == ["body", "head"], "images of a run came as they were"
    prepared = tv(pretrained=written(tmp_path / "a.pth", library(9).state_dict()), channels=1)
    back = tv(pretrained=written(tmp_path / "b.pth", prepared.state_dict()), channels=1)
    assert relative(back.state_dict(), prepared.state_dict()) == 0
    ten = tv(pretrained=written(tmp_path / "c.pth", prepared.state_dict()), channels=1, outputs=10)
    assert ten.head.weight.shape == (10, 1024) and relative(ten.body.state_dict(), prepared.body.state_dict()) == 0


def test_names_of_older_versions_are_known_to_the_modules(tmp_path: Path) -> None:
    """torchvision's ViT files call the layers of a block linear_1 and linear_2."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        theirs = models.VisionTransformer(32, 16, 1, 2, 16, 24, num_classes=5)
    old = {
        re.sub(r"mlp\.0\.", "mlp.linear_1.", re.sub(r"mlp\.3\.", "mlp.linear_2.", k)): v for k, v in theirs.state_dict().items()
    }
    assert any("linear_1" in name for name in old)
    model = models.VisionTransformer(32, 16, 1, 2, 16, 24, num_classes=5)
    load(model, read(Path(written(tmp_path / "old.pth", old))), "old.pth", "it")
    assert relative(model.state_dict(), theirs.state_dict()) == 0


def test_names_of_the_first_densenets_are_known(tmp_path: Path) -> None:
    def dense(seed: int) -> Headed:
        torch.manual_seed(seed)
        return Headed(OrderedDict(body=models.DenseNet(4, (1, 1), 8, num_classes=5), head=nn.Linear(5, 2)))

    theirs, made = dense(8), dense(9)
    old = {re.sub(r"(denselayer\d+\.\w+?)([12])\.", r"\1.\2.", name): t for name, t in theirs.body.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load(made, read(Path(written(tmp_path / "old.pth", old))), "old.pth", "it")
    assert relative(made.body.state_dict(), theirs.body.state_dict()) == 0


def test_any_model_takes_a_file_of_its_own_names(tmp_path: Path) -> None:
    wanted = network("conv4", GIVEN | {"seed": 8})
    made = network("conv4", GIVEN | {"pretrained": written(tmp_path / "w.pth", wanted.state_dict())})
    assert relative(made.state_dict(), wanted.state_dict()) == 0 and made.pretrained_on == "file w.pth"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_what_ddp_and_compile_put_before_names_is_taken_off(wrapper: str, tmp_path: Path) -> None:
    state = network("conv4", GIVEN | {"seed": 8}).state_dict()
    file = written(tmp_path / "w.pth", {f"{wrapper}{name}": tensor for name, tensor in state.items()})
    assert relative(network("conv4", GIVEN | {"pretrained": file}).state_dict(), state) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_a_checkpoint_of_a_run_of_timm_without_weights_comes_back(channels: int, tmp_path: Path) -> None:
    """Its model was built for these channels, where one that starts from weights is built for colour."""
    pytest.importorskip("timm")
    first = timm_model("test_vit", 5, channels, 32, seed=3, depth=1)
    file = written(tmp_path / "weights.safetensors", flatten(algorithms.maml(first, inner_lr=0.1).init()))
    again = timm_model("test_vit", 5, channels, 32, seed=4, pretrained=file, depth=1)
    x = images(channels)
    assert torch.equal(again.eval()(x), first.eval()(x))
    with pytest.raises(UserError, match="does not fit timm:test_vit"):
        other = written(tmp_path / "other.safetensors", {"w": torch.zeros(2)})
        timm_model("test_vit", 5, 1, 32, pretrained=other, depth=1)


def test_a_checkpoint_holds_tied_weights_by_one_of_their_names(tmp_path: Path) -> None:
    torch.manual_seed(8)
    wanted, made = Tied(), Tied()
    assert relative(made.state_dict(), wanted.state_dict()) > 0.1
    file = written(tmp_path / "weights.safetensors", flatten(algorithms.maml(wanted, inner_lr=0.1).init()))
    assert "head.weight" not in read(Path(file)), "nothing is tied here"
    load(made, read(Path(file)), file, "it")
    assert relative(made.state_dict(), wanted.state_dict()) == 0


def test_a_layer_of_the_body_that_is_called_head_is_missed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_convnext").state_dict()
    assert timm_model("test_convnext", 5, 3, 32, pretrained=written(tmp_path / "a.pth", state)).pretrained_on == "file a.pth"
    del state["head.norm.weight"]
    with pytest.raises(UserError, match=r"fit timm:test_convnext: head\.norm\.weight is in the model but not in it; give"):
        timm_model("test_convnext", 5, 3, 32, pretrained=written(tmp_path / "b.pth", state))


# What goes wrong is a sentence.

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "unknown": (lambda: tv("resnet17"), r"unknown model of torchvision 'resnet17'; did you mean 'resnet18' or .*list_models"),
    "nothing near": (lambda: tv("zzzz"), r"unknown model of torchvision 'zzzz' \(torchvision\.models\.list_models"),
    "no classifier": (lambda: tv("fasterrcnn_resnet50_fpn"), "unknown model of torchvision"),
    "no linear end": (lambda: tv("squeezenet1_0", size=64), "tv:squeezenet1_0 does not end in a linear layer, so it has"),
    "more heads": (lambda: tv("googlenet"), "tv:googlenet has several classifiers, and one loss cannot train them all"),
    "channels": (lambda: tv(channels=4), r"takes images of 3 channels, or of 1 by repeating it, but these have 4; use a model"),
    "patches": (lambda: tv("vit_b_32", size=48), r"is a multiple of 32, and these have 48 pixels; add --model\.resize 64"),
    "resized patches": (lambda: tv("vit_b_32", resize=48), r"a multiple of 32, and these have 48 pixels"),
    "table": (lambda: tv("vit_b_32", pretrained="default"), r"for images 224 pixels wide, and these have 32; add --mod"),
    "small": (lambda: tv("mobilenet_v2", size=0), r"cannot take images of 0 x 0 \(.*\); add --model\.resize 224$"),
    "normalise": (lambda: tv(normalise="maybe"), r"unknown value of normalise 'maybe'.*\(known: auto, no, yes\)"),
    "resize": (lambda: tv(resize=-1), "resize=-1; give 1 output or more, resize 0 or more"),
    "outputs": (lambda: tv(outputs=0), "0 outputs"),
    "suffix": (lambda: tv(pretrained="defualt"), "--pretrained defualt is neither default nor a file of weights; give"),
    "no file": (lambda: tv(pretrained="gone.pth"), r"there is no file gone\.pth; give --pretrained the path of a file"),
    "no weights": (lambda: network("conv4", GIVEN | {"pretrained": "default"}), "conv4 comes without weights; leave out --pre"),
    "a setting": (lambda: network(f"tv:{SMALL}", GIVEN, ["widht=3"]), r"cannot be made: TypeError: .*'widht'"),
    "a given": (lambda: network(f"tv:{SMALL}", GIVEN, ["outputs=3"]), "has no setting 'outputs'"),
    "no name": (lambda: network("tv", GIVEN), "the model tv needs name"),
    "half a name": (lambda: network("tv:", GIVEN), "'tv:' names only half of a plug-in"),
}  # fmt: skip
TIMM: dict[str, tuple[Callable[[], object], str]] = {
    "unknown": (lambda: timm_model("vit_tny_patch16_224", 5, 3, 32), "'vit_tny_patch16_224'; did you mean 'vit_tiny_patch16"),
    "tag": (lambda: timm_model("test_resnet.mine", 5, 3, 32), r"no weights 'test_resnet\.mine'; it has test_resnet\.r160"),
    "patches": (lambda: timm_model("test_vit", 5, 1, 28), r"multiple of 16, and these have 28 pixels; add --model\.resize 32"),
    "fixed": (lambda: timm_model("test_maxvit", 5, 3, 28), r"timm:test_maxvit .*--model\.resize \d"),
    "outputs": (lambda: timm_model("test_vit", 5, 3, 32, num_classes=7), r"num_classes follows .*; leave --model\.num_classes"),
    "channels": (lambda: timm_model("test_vit", 5, 4, 32, pretrained="w.pth"), "takes images of 3 channels"),
    "no file": (lambda: timm_model("test_vit", 5, 3, 32, pretrained="gone.pth"), r"there is no file gone\.pth"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *(f"timm, {case}" for case in TIMM)])
def test_a_mistake_is_a_sentence(case: str) -> None:
    if case.startswith("timm, "):
        pytest.importorskip("timm")
    make, said = TIMM[case.removeprefix("timm, ")] if case.startswith("timm, ") else REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def changed(change: Callable[[Tensors], object]) -> Tensors:
    state = dict(library(9).state_dict())
    change(state)
    return state


def narrower(state: Tensors) -> None:
    for name in ("conv1.0.weight", "conv5.0.weight", "stage2.0.branch1.0.weight", "stage2.0.branch1.2.weight"):
        state[name] = state[name][:3]


UNFIT: dict[str, tuple[Any, str]] = {
    "shapes": (
        lambda: changed(narrower),
        r"does not fit tv:shuff\w*: conv1\.0\.weight is \(3, 3, 3, 3\) in it and \(24, 3, 3, 3\) in the model; "
        r"stage2\.0\.branch1\.0\.weight is .*; stage2\.0\.branch1\.2\.weight is .* in the model; and 1 more; give weights of",
    ),
    "more": (lambda: changed(lambda s: s.update(extra=torch.ones(2))), "extra is in it but not in the model; give weights"),
    "less": (lambda: changed(lambda s: s.pop("conv5.0.weight")), r"conv5\.0\.weight is in the model but not in it; give"),
    "another": (lambda: dict(nn.Linear(3, 2).named_parameters()), r": weight is in it but .*; bias is .*; body.* and \d+ more"),
    "not finite": (lambda: changed(lambda s: s["conv5.0.weight"].fill_(torch.nan)), "not finite, in conv5.0.weight; give a"),
    "numbers": (lambda: {"epoch": 3, "best": 0.5}, r"does not hold tensors by name alone \(it holds epoch, best\)"),
    "a tensor": (lambda: torch.ones(3), "does not hold tensors by name alone .it holds Tensor"),
    "a module": (lambda: nn.Linear(2, 2), "is no file of weights .UnpicklingError: Weights only load failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_does_not_fit_is_a_sentence(case: str, tmp_path: Path) -> None:
    make, said = UNFIT[case]
    with pytest.raises(UserError, match=said) as error:
        tv(pretrained=written(tmp_path / "w.pth", make()))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_torn_file_is_a_sentence(name: str, tmp_path: Path) -> None:
    path = Path(written(tmp_path / name, library(9).state_dict()))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{name} is no file of weights \(\w+: .*\); save a state dict$"):
        tv(pretrained=str(path))


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"models of timm need that package .*; run pip install timm"):
        timm_model("test_vit", 5, 3, 32)


# In an experiment.

MINE = """
import torch
from torch import nn
from toolkit.data.bank import ClassBank

def bank(split):
    names = ("Gold_Fish", "n01440764", "blue jay", "jay", "GOLD FISH 2") if split == "test" else ("gold fish",) * 5
    return ClassBank(torch.zeros(50, 3, 8, 8), torch.arange(0, 51, 10), names, split)

def texts(split):
    return ClassBank(torch.ones(50, 6, dtype=torch.int64), torch.arange(0, 51, 10), tuple("abcde"), split)

def net(outputs, on="ImageNet-1k", classes=("gold fish", "Blue Jay")):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))
    model.pretrained_on, model.pretrained_classes = on, classes
    return model
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EpisodeFlags]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)

    def flags(model: str, *settings: str, bank: str = "bank") -> EpisodeFlags:
        return EpisodeFlags(sampler=f"mine.py:{bank}", model=model, eval_queries=1, model_args=settings)

    return flags


def test_test_classes_that_were_pretrained_on_are_a_warning(
    mine: Callable[..., EpisodeFlags], caplog: pytest.LogCaptureFixture
) -> None:
    assemble(mine("mine.py:net"))
    said = "mine.py:net was pretrained on ImageNet-1k, where 3 of the 5 test classes occur (Gold_Fish, n01440764, blue jay)"
    assert [record.message.startswith(said) for record in caplog.records if record.levelname == "WARNING"] == [True]
    caplog.clear()
    for settings in (("classes=()", "on=another"), ("on=", "classes=()")):
        assemble(mine("mine.py:net", *settings))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_texts_are_nothing_for_a_model_of_images_and_the_other_way_round(mine: Callable[..., EpisodeFlags]) -> None:
    with pytest.raises(
        UserError, match=rf"--model tv:{SMALL} takes square images, but these tasks have feature numbers of shape"
    ):
        assemble(mine(f"tv:{SMALL}", bank="texts"))
    with pytest.raises(
        UserError, match=r"--model hf:minilm takes texts, but these tasks have square images .*; use --model conv4"
    ):
        assemble(mine("hf:minilm"))
