"""Operations on modules, and models made from others: what is computed, named, shared, drawn and left alone."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import convolutional, dense, relative, task_batch
from toolkit import Learner, UserError, algorithms, meta_gradient
from toolkit.models import surgery
from toolkit.models.surgery import attention_head, lora, warped, widened, with_context
from toolkit.modules import copy_modules, reached, select, without_head
from toolkit.task import take
from toolkit.tree import matches


def named(**layers: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    ordered: Any = OrderedDict(layers)
    return nn.Sequential(ordered).double()


def network() -> nn.Module:
    """Linear layers with names: three numbers to two classes."""
    return named(first=nn.Linear(3, 5), squash=nn.Tanh(), second=nn.Linear(5, 4), head=nn.Linear(4, 2))


def images() -> nn.Module:
    """Convolutions of every kind of shape, with a batch norm in evaluation mode: 8x8 images to two classes."""
    body = named(
        one=nn.Conv2d(1, 4, 3, stride=2, padding=1), norm=nn.BatchNorm2d(4).eval(), soft=nn.Softplus(),
        two=nn.Conv2d(4, 6, (1, 3), padding=(0, 1), dilation=1, groups=2), three=nn.Conv2d(6, 3, 3, padding="same", dilation=2),
        four=nn.Conv2d(3, 3, 1, bias=False),
    )  # fmt: skip
    return named(body=body, flat=nn.Flatten(), head=nn.Linear(48, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (network, (3,)), "convolutional": (images, (1, 8, 8)), "one layer": (lambda: nn.Linear(3, 2).double(), (3,)),
}  # fmt: skip
SURGERY: dict[str, Callable[..., nn.Module]] = {
    "lora": lambda model, **more: lora(model, 2, peft=False, **more),
    "lora of a part": lambda model, **more: lora(model, 2, layers=("*first*", "*two", "head"), peft=False, **more),
    "warped": warped,
    "with context": with_context,
    "attention head": attention_head,
    "widened": lambda model, **more: widened(model, 7, **more),
}
SAME = ("lora", "lora of a part", "warped", "with context")
CASES = [(s, m) for s in SURGERY for m in MODELS if m != "one layer" or s in ("lora", "warped", "with context")]


def inputs(model: str) -> Tensor:
    return take(task_batch(shape=MODELS[model][1], query=9), 0).query.x


def pictured(model: nn.Module) -> dict[str, tuple[Tensor, bool, int]]:
    """All that the given model must keep: values, flags and storage of its tensors."""
    state = model.state_dict(keep_vars=True)
    return {name: (t.detach().clone(), t.requires_grad, t.data_ptr()) for name, t in state.items()}


@pytest.mark.parametrize(("made", "model"), [case for case in CASES if case[0] in SAME])
def test_the_same_function_at_first(made: str, model: str) -> None:
    given, x = MODELS[model][0](), inputs(model)
    new = SURGERY[made](given)
    assert sum(p.numel() for p in new.parameters()) > sum(p.numel() for p in given.parameters())
    assert relative(new(x), given(x)) < 1e-12
    added = {name: p for name, p in new.named_parameters() if any(part in name for part in ("lora_B", "warp.", "context"))}
    with torch.no_grad():
        for p in added.values():
            p += 0.1
    assert added and relative(new(x), given(x)) > 1e-3, "the new parameters must matter"


@pytest.mark.parametrize(("made", "model"), CASES)
def test_the_given_model_the_random_state_and_modes_are_left_alone(made: str, model: str) -> None:
    given = MODELS[model][0]()
    next(given.parameters()).requires_grad_(False)
    before, text, modes, state = pictured(given), repr(given), [m.training for m in given.modules()], torch.get_rng_state()
    new = SURGERY[made](given)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in new.parameters():
            p += 1
    after = pictured(given)
    assert repr(given) == text and [m.training for m in given.modules()] == modes and list(after) == list(before)
    for name, (values, flag, pointer) in before.items():
        assert torch.equal(after[name][0], values) and after[name][1:] == (flag, pointer), name
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    ours = {p.data_ptr() for p in given.parameters()}
    assert not ours & {p.data_ptr() for p in new.parameters()}, "a copy shares nothing"


@pytest.mark.parametrize(("made", "model"), [case for case in CASES if case[0] in ("lora", "with context", "widened")])
def test_seeds_repeat_and_differ(made: str, model: str) -> None:
    given, drawn = MODELS[model][0](), []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        drawn.append(torch.cat([p.detach().flatten() for p in SURGERY[made](given, seed=seed).parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


NEW = {
    "lora": ("lora_",), "lora of a part": ("lora_",), "warped": ("warp.weight",),
    "with context": ("context", "generate.weight"),
    "attention head": ("head.keys", "head.values", "head.log_scale"), "widened": ("head.weight", "head.bias"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "model"), CASES)
def test_frozen_stays_frozen_and_what_is_new_is_trained(made: str, model: str) -> None:
    given = MODELS[model][0]().requires_grad_(False)
    trained = {name for name, p in SURGERY[made](given).named_parameters() if p.requires_grad}
    assert trained and trained == {n for n in names(SURGERY[made](given)) if any(part in n for part in NEW[made])}
    given.requires_grad_(True)
    assert all(p.requires_grad for p in SURGERY[made](given).parameters())


def names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_names_of_adapters() -> None:
    assert names(lora(network(), 2, "*s*", peft=False)) == {
        "first.base_layer.weight": (5, 3), "first.base_layer.bias": (5,),
        "first.lora_A.weight": (2, 3), "first.lora_B.weight": (5, 2),
        "second.base_layer.weight": (4, 5), "second.base_layer.bias": (4,),
        "second.lora_A.weight": (2, 5), "second.lora_B.weight": (4, 2),
        "head.weight": (2, 4), "head.bias": (2,),
    }  # fmt: skip
    assert {n: s for n, s in names(lora(images(), 2, "body.one", peft=False)).items() if "lora_" in n} == {
        "body.one.lora_A.weight": (2, 1, 3, 3), "body.one.lora_B.weight": (4, 2, 1, 1),
    }  # fmt: skip
    assert set(names(lora(nn.Linear(3, 2), 1, peft=False))) == {
        "base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight",
    }  # fmt: skip


def test_a_low_rank_update_is_the_product_of_its_factors() -> None:
    given, x = network(), inputs("linear")
    new = lora(given, 2, "head", peft=False)
    weights = dict(new.named_parameters())
    with torch.no_grad():
        weights["head.lora_B.weight"].normal_()
        expected = given(x) + given[:-1](x) @ (weights["head.lora_B.weight"] @ weights["head.lora_A.weight"]).T
    assert relative(new(x), expected) < 1e-12


def test_names_of_warp_layers() -> None:
    found = {name: shape for name, shape in names(warped(network())).items() if "warp" in name}
    assert found == {"first.warp.weight": (5, 5), "second.warp.weight": (4, 4)}
    found = {name: shape for name, shape in names(warped(images(), "head")).items() if "warp" in name}
    assert found["body.two.warp.weight"] == (6, 6, 1, 1) and "head.warp.weight" not in found and len(found) == 4
    assert "head.layer.weight" in names(warped(network(), "first")) and "first.weight" in names(warped(network(), "first"))


def test_names_and_place_of_context() -> None:
    """The first layer, or the third convolution, as in the paper; another by name."""
    found = {name: shape for name, shape in names(with_context(network())).items() if not name.startswith(("second", "head"))}
    assert found == {
        "first.context": (5,), "first.layer.weight": (5, 3), "first.layer.bias": (5,), "first.generate.weight": (5, 5),
    }  # fmt: skip
    found = names(with_context(images(), 4))
    assert found["body.three.context"] == (4,) and found["body.three.generate.weight"] == (6, 4)
    assert names(with_context(images(), 4, "body.one"))["body.one.generate.weight"] == (8, 4)
    after_norm = named(a=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), soft=nn.Softplus(), flat=nn.Flatten(), c=nn.Linear(72, 2))
    assert "norm.context" in names(with_context(after_norm)), "normalisation would undo what comes before it"
    assert "a.context" in names(with_context(after_norm, layer="a")), "unless it is asked for"
    two = named(a=nn.Conv2d(1, 2, 3), b=nn.Conv2d(2, 3, 3), flat=nn.Flatten(), c=nn.Linear(3, 2))
    assert "b.context" in names(with_context(two)), "the last one where there are fewer than three"


def test_context_scales_and_shifts() -> None:
    given, x = network(), inputs("linear")
    new = with_context(given, 3, "second")
    weights = dict(new.named_parameters())
    with torch.no_grad():
        weights["second.context"].copy_(torch.tensor([0.5, -1.0, 2.0]))
        hidden = given.second(given.squash(given.first(x))) + weights["second.generate.weight"] @ weights["second.context"]
        assert relative(new(x), given.head(hidden)) < 1e-12
    pictures = named(only=nn.Conv2d(1, 2, 3), flat=nn.Flatten(), head=nn.Linear(72, 2))
    new, x = with_context(pictures, 3), inputs("convolutional")
    weights = dict(new.named_parameters())
    with torch.no_grad():
        weights["only.context"].copy_(torch.tensor([0.5, -1.0, 2.0]))
        change = weights["only.generate.weight"] @ weights["only.context"]
        y = pictures.only(x) * (1 + change[:2].view(1, 2, 1, 1)) + change[2:].view(1, 2, 1, 1)
        assert relative(new(x), pictures.head(y.flatten(1))) < 1e-12


def test_attention_over_remembered_examples() -> None:
    """log of a(x, x_i) y_i with a the softmax of 10 times the cosine (Vinyals et al. 2016, equations 1 and 2)."""
    given, x = network(), inputs("linear")
    new = attention_head(given)
    assert names(new)["head.keys"] == (2, 4) and names(new)["head.values"] == (2, 2)
    assert set(names(new)) == {n for n in names(given) if not n.startswith("head")} | {*NEW["attention head"]}
    keys, classes = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 0])
    values = nn.functional.one_hot(classes, 2).double()
    found = torch.func.functional_call(new, {"head.keys": keys, "head.values": values}, x)
    features, temperature = given[:-1](x), new.get_parameter("head.log_scale").exp()
    assert temperature.item() == pytest.approx(10, rel=1e-6)
    for row, feature in zip(found, features, strict=True):
        shares = torch.stack([temperature * nn.functional.cosine_similarity(feature, key, dim=0) for key in keys]).softmax(0)
        expected = torch.stack([shares[classes == c].sum() for c in range(2)])
        assert relative(row.exp(), expected) < 1e-12
    none_of_class_1 = torch.func.functional_call(new, {"head.keys": keys[:2], "head.values": values[:2]}, x)
    assert none_of_class_1.isfinite().all()


def test_another_width_of_head() -> None:
    given, x = network(), inputs("linear")
    new = widened(given, 64)
    assert names(new) == {**names(given), "head.weight": (64, 4), "head.bias": (64,)} and new(x).shape == (9, 64)
    assert relative(new[:-1](x), given[:-1](x)) == 0
    inherited = algorithms.maml(network(), inner_steps=0).inherit(algorithms.maml(new, inner_steps=0).init())
    assert set(inherited.params) == set(names(given))


def test_context_at_normalisation_without_weights_of_its_own() -> None:
    """InstanceNorm2d has none by default. In front of it, context would be normalised away."""
    x = inputs("convolutional")
    for norm in (nn.InstanceNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.GroupNorm(1, 2, affine=False), nn.GroupNorm(2, 2)):
        model = named(a=nn.Conv2d(1, 2, 3), norm=norm, flat=nn.Flatten(), c=nn.Linear(72, 2))
        made = with_context(model)
        assert relative(made(x), model(x)) < 1e-12
        (name,) = (name for name in names(made) if name.endswith("context"))
        assert name == "norm.context"
        made(x).square().sum().backward()
        assert float(made.get_parameter(name).grad.norm()) > 1e-2


def test_layers_chosen_by_a_predicate() -> None:
    new = lora(network(), 1, lambda name: name == "second", peft=False)
    assert {n for n in names(new) if "lora_" in n} == {"second.lora_A.weight", "second.lora_B.weight"}


LAYERS = "names no linear or convolutional layer of the model; it has first, second, head$"
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no such layer": (lambda: lora(network(), 2, "thrid", peft=False), f"'thrid' {LAYERS}"),
    "a layer of another kind": (lambda: lora(network(), 2, "squash", peft=False), f"'squash' {LAYERS}"),
    "no such place": (
        lambda: with_context(network(), 5, "thrid"),
        "layer='thrid' cannot listen to context parameters; these layers can: first, second, head$",
    ),
    "no context": (lambda: with_context(network(), 0), "0 context parameters; give at least 1"),
    "no such head": (lambda: attention_head(network(), "classifier"), f"'classifier' {LAYERS}"),
    "no such head to widen": (lambda: widened(network(), 7, "classifier"), f"'classifier' {LAYERS}"),
    "no layers at all": (lambda: lora(nn.Tanh(), peft=False), r"'\*' names no linear .* it has none$"),
    "no layers to warp": (lambda: warped(nn.Tanh()), r"names no linear .* it has none$"),
    "no layers for context": (lambda: with_context(nn.Tanh()), "cannot listen to context parameters; these layers can: none$"),
    "rank 0": (lambda: lora(network(), 0, peft=False), "adapters of rank 0; give rank 1 or more"),
    "negative rank": (lambda: lora(network(), -1), "adapters of rank -1; give rank 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_a_sentence(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_head_alone_cannot_be_warped_and_the_sentence_is_readable() -> None:
    with pytest.raises(UserError, match=r"but its head .head., so there is none to warp; use a deeper one$") as caught:
        warped(named(head=nn.Linear(3, 2)))
    assert "lambda" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_a_prefix_of_the_head_is_not_the_head() -> None:
    model = named(header=nn.Linear(3, 4), head=nn.Linear(4, 2))
    assert "header.warp.weight" in names(warped(model)) and "head.warp.weight" not in names(warped(model))


@pytest.mark.parametrize("made", SAME)
def test_made_models_learn(made: str) -> None:
    """Each is a model like any other: exact meta-gradients reach the new parameters."""
    model = SURGERY[made](network())
    learner = algorithms.maml(model, inner_lr=0.5, inner_steps=2)
    grads, _ = meta_gradient(learner, learner.init(), task_batch())
    reached = {name for name, g in grads.params.items() if bool(g.any())}
    still = {name for name in grads.params if name.endswith("generate.weight")} - reached
    assert reached | still == set(names(model))


@pytest.mark.parametrize("model", ["linear", "convolutional"])
def test_the_adapters_of_peft_are_ours(model: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    given, x = MODELS[model][0](), inputs(model)
    layers = "*" if model == "linear" else "body.one"
    for p in given[0].parameters():
        p.requires_grad_(False)
    before, text = pictured(given), repr(given)
    theirs, ours = (lora(given, 2, layers, peft=peft) for peft in (True, False))
    assert relative(theirs(x), given(x)) < 1e-12
    assert {n.replace(".default", ""): s for n, s in names(theirs).items()} == names(ours)
    trained = [{n.replace(".default", "") for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert trained[0] == trained[1]
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.full_like(p, 0.1) if "lora_" in name else p)
        for name, p in ours.named_parameters():
            p.copy_(torch.full_like(p, 0.1) if "lora_" in name else p)
    assert relative(theirs(x), ours(x)) < 1e-12 and relative(ours(x), given(x)) > 1e-3
    assert repr(given) == text and all(torch.equal(pictured(given)[n][0], v[0]) for n, v in before.items())
    again = lora(given, 2, layers, peft=True)
    fresh = lora(given, 2, layers, peft=True, seed=1)
    assert relative([*again.parameters()], [*lora(given, 2, layers, peft=True).parameters()]) == 0
    assert relative([*again.parameters()], [*fresh.parameters()]) > 1e-3


def test_peft_takes_the_chosen_layers_alone() -> None:
    """Its own lists of names also match the ends of names."""
    pytest.importorskip("peft", reason="peft is not installed")
    model = named(body=named(head=nn.Linear(3, 4)), head=nn.Linear(4, 2))
    found = {name for name in names(lora(model, 2, "head", peft=True)) if "lora_" in name}
    assert found and all(name.startswith("head.") for name in found)


def test_peft_is_used_by_default_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert isinstance(lora(network()).get_submodule("head"), surgery.Lora)
    with pytest.raises(UserError, match="run pip install peft, or use peft=False"):
        lora(network(), peft=True)


def test_select_keeps_the_models_order_and_leaves_frozen_ones_out() -> None:
    model = network()
    assert select(model, ("head.*", "first.bias")) == ("first.bias", "head.weight", "head.bias")
    assert select(model, "*") == tuple(names(model)) and select(model, ()) == ()
    assert select(model, lambda name: name.endswith("bias")) == ("first.bias", "second.bias", "head.bias")
    assert select(model, ("*bias", "head*")) == ("first.bias", "second.bias", "head.weight", "head.bias")
    model.get_parameter("head.bias").requires_grad_(False)
    assert select(model, "head.*") == ("head.weight",)
    for nothing in ("head.bias", ("*", "head.bias"), lambda name: False):
        with pytest.raises(UserError, match=r"matches no trained parameter; the model has first\.weight, .*, head\.weight$"):
            select(model, nothing)
    assert matches("head.weight", ("first*", "head*")) and not matches("head.weight", ())


def test_select_takes_a_tied_parameter_by_any_of_its_names_once() -> None:
    model = named(a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.b.weight = model.a.weight
    assert select(model, "b.*") == ("a.weight", "b.bias") and select(model, "*.weight") == ("a.weight",)


@pytest.mark.parametrize("build", [dense, convolutional, network, images])
def test_a_copy_of_modules_shares_its_tensors(build: Callable[[], nn.Module]) -> None:
    model = build()
    copied = copy_modules(model)
    own, theirs = model.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert list(own) == list(theirs) and all(own[name] is theirs[name] for name in own)
    assert not {id(m) for m in model.modules()} & {id(m) for m in copied.modules()}
    modes = [m.training for m in model.modules()]
    assert [m.training for m in copied.modules()] == modes
    copied.eval()
    next(copied.children()).register_parameter("weight", nn.Parameter(torch.zeros(1)))
    assert [m.training for m in model.modules()] == modes and model.state_dict(keep_vars=True).keys() == own.keys()
    assert next(iter(model.state_dict(keep_vars=True).values())) is next(iter(own.values()))


def test_a_model_without_its_head() -> None:
    model, x = network(), inputs("linear")
    body = without_head(model, "head")
    assert body is not None and set(names(body)) == {n for n in names(model) if not n.startswith("head")}
    assert torch.equal(reached(lambda: body(x), "head"), model[:-1](x))
    with pytest.raises(UserError, match="the model does not use its layer 'head', so that is no head; name the last linear"):
        reached(lambda: x, "head")
    assert body.get_parameter("first.weight") is model.get_parameter("first.weight")
    assert isinstance(model.get_submodule("head"), nn.Linear)
    middle = without_head(model, "second")
    assert middle is not None and not isinstance(middle.get_submodule("second"), nn.Linear)
    assert without_head(model, "classifier") is None and without_head(model, "") is None


def test_what_the_head_gets() -> None:
    model, x = network(), inputs("linear")
    learner: Learner = algorithms.maml(model)
    meta = learner.init()
    shifted = {name: p + 1 for name, p in meta.params.items()}
    expected = torch.func.functional_call(model[:-1], {n: p for n, p in shifted.items() if not n.startswith("head")}, x)
    assert relative(learner.embed(meta, shifted, x), expected) < 1e-14
    with pytest.raises(
        UserError, match=r"head='classifier' names no layer of the model; its linear layers are first, second, h"
    ):
        algorithms.maml(model, head="classifier").embed(meta, {}, x)
