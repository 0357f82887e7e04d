"""Layers around layers: low-rank updates of attention, prompts, and plain layers made of them again."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import mean_objective, named, relative, stirred, task_batch
from toolkit import Meta, UserError, algorithms, meta_gradient
from toolkit.models.adapters import Lora, LoraAttention, Prompted, fold
from toolkit.models.surgery import able, lora, prompted, warped, with_context
from toolkit.task import Task
from toolkit.tree import dot


def stir(model: nn.Module, part: str = "", scale: float = 0.3) -> nn.Module:
    """The model with random values in all parameters whose name holds `part`."""
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if part in name:
            p.data = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def vision() -> nn.Module:
    """torchvision's vision transformer for 8x8 images and two classes."""
    from torchvision.models import VisionTransformer

    return stir(VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=4, mlp_dim=6, num_classes=2).double())


class Words(nn.Module):
    """A transformer of torch.nn on three numbers, each a token, the first axis being the tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation=nn.functional.softplus)
        self.up, self.encoder, self.head = nn.Linear(1, 4), nn.TransformerEncoder(layer, 2, None, False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.up(x.T.unsqueeze(-1)))
        return self.head(y.mean(0))  # type: ignore[no-any-return]


def words() -> nn.Module:
    return stir(Words().double(), scale=0.5)


def looked(case: str) -> tuple[nn.Module, Tensor]:
    make, shape = {"vision": (vision, (3, 8, 8)), "words": (words, (3,))}[case]
    return make(), task_batch(shape=shape).query.x[0]


@pytest.mark.parametrize("case", ["vision", "words"])
def test_adapters_of_attention_change_nothing_at_first_and_then_something(case: str) -> None:
    given, x = looked(case)
    new = lora(given, 2, peft=False)
    assert torch.equal(new(x), given(x)), "bit for bit"
    with torch.no_grad():
        assert relative(new.eval()(x), given.eval()(x)) < 1e-12, "what torch computes so by kernels of its own"
    before = new(x)
    for part in ("in_proj", "out_proj"):  # each of the two alone
        turned = copy.deepcopy(new)
        for name, module in turned.named_modules():
            if isinstance(module, LoraAttention) if part == "in_proj" else name.endswith("out_proj"):
                stir(module.lora_B)  # type: ignore[arg-type]
        assert relative(turned(x), before) > 1e-3


def test_names_of_adapters_of_attention() -> None:
    own = [name for name, _ in lora(vision(), 2, "*layer_0.self_attention*", peft=False).named_parameters() if "lora" in name]
    stem = "encoder.layers.encoder_layer_0.self_attention"
    assert set(own) == {f"{stem}{at}.lora_{which}.weight" for at in ("", ".base_layer.out_proj") for which in "AB"}
    alone = lora(vision(), 2, "*layer_0.self_attention", peft=False)
    assert {name for name, _ in alone.named_parameters() if "lora" in name} == {f"{stem}.lora_{which}.weight" for which in "AB"}
    shapes = dict(alone.named_parameters())
    assert shapes[f"{stem}.lora_A.weight"].shape == (2, 4) and shapes[f"{stem}.lora_B.weight"].shape == (12, 2)
    assert [name for name in able(vision()) if "layer_0" in name] == [
        f"encoder.layers.encoder_layer_0.{part}" for part in ("self_attention", "self_attention.out_proj", "mlp.0", "mlp.3")
    ]
    odd = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    assert able(named(odd=odd)) == ["odd.out_proj"], "without one matrix for all three there is none to update"


def test_attention_and_other_surgery() -> None:
    """Attention of torch.nn reads the weights of its output projection, so no other layer may stand in its place."""
    given, x = looked("words")
    assert relative(warped(given)(x), given(x)) < 1e-12 and relative(with_context(given)(x), given(x)) < 1e-12
    with pytest.raises(UserError, match=r"cannot listen to context parameters; these layers can: up, "):
        with_context(given, layer="encoder.layers.0.self_attn.out_proj")


ATTENTION: dict[str, Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], dict[str, object]]]] = {
    "itself": lambda q, k: ((q, q, q), {"need_weights": False}),
    "itself, and shares": lambda q, k: ((q, q, q), {}),
    "shares of each head": lambda q, k: ((q, q, q), {"average_attn_weights": False}),
    "another": lambda q, k: ((q, k, k), {"need_weights": False}),
    "one example": lambda q, k: ((q[0], q[0], q[0]), {"need_weights": False}),
    "masked": lambda q, k: ((q, q, q), {"need_weights": False, "attn_mask": torch.ones(5, 5).triu(1).bool()}),
    "causal": lambda q, k: (
        (q, q, q),
        {"need_weights": False, "attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    ),
    "padded": lambda q, k: ((q, q, q), {"need_weights": False, "key_padding_mask": torch.arange(5).expand(5, 5) > 3}),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("more", ["bias", "", "add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("case", ATTENTION)
def test_every_use_of_attention_is_that_of_plain_attention_with_the_sum_of_weights(case: str, more: str, first: bool) -> None:
    settings: dict[str, bool] = {"bias": False, **({more: True} if more else {})}
    base = named(attention=nn.MultiheadAttention(4, 2, batch_first=first, **settings))
    new = stir(lora(base, 2, peft=False), "lora_").get_submodule("attention")
    plain = fold(new)
    assert type(plain) is nn.MultiheadAttention and isinstance(new, LoraAttention)
    weights = new.lora_B.weight @ new.lora_A.weight
    assert relative(plain.in_proj_weight - base.attention.in_proj_weight, weights) < 1e-12
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(5, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    arguments, asked = ATTENTION[case](q, k)
    (found, shares), (expected, theirs) = new(*arguments, **asked), plain(*arguments, **asked)
    assert found.shape == expected.shape and relative(found, expected) < 1e-12
    assert (shares is None) == (theirs is None) and (shares is None or relative(shares, theirs) < 1e-12)


def test_dropout_of_attention_is_kept() -> None:
    base = named(attention=nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True))
    new, x = lora(base, 2, peft=False), torch.randn(3, 6, 4, dtype=torch.float64)
    drawn = []
    for model in (base, new):
        torch.manual_seed(1)
        drawn.append(model.attention(x, x, x, need_weights=False)[0])
    assert torch.equal(*drawn) and not torch.equal(drawn[0], base.eval().attention(x, x, x, need_weights=False)[0])


def directional(case: str, model: nn.Module, tasks: Task, head: str, adapts: tuple[str, ...]) -> None:
    """The meta-gradient against central differences along random directions."""
    learner = algorithms.maml(model, inner_lr=0.2, inner_steps=2, adapts=adapts, head=head)
    meta = stirred(learner)
    grads, _ = meta_gradient(learner, meta, tasks)
    value, generator = mean_objective(learner, tasks), torch.Generator().manual_seed(6)
    for _ in range(3):
        way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in meta.params.items()}
        above, below = (value(Meta({n: p + h * way[n] for n, p in meta.params.items()}, meta.learned)) for h in (1e-5, -1e-5))
        assert dot(grads.params, way).item() == pytest.approx(float(above - below) / 2e-5, rel=1e-6), case


@pytest.mark.parametrize("case", ["vision", "words"])
def test_the_meta_gradient_through_adapters_of_attention_is_exact(case: str) -> None:
    model, _ = looked(case)
    tasks = task_batch(2, (3, 8, 8) if case == "vision" else (3,), 3, 3)
    head = "heads.head" if case == "vision" else "head"
    directional(case, lora(model, 2, peft=False), tasks, head, ("*lora_*", f"{head}.*"))


def test_the_meta_gradient_through_prompts_is_exact() -> None:
    directional("prompts", prompted(vision(), 3), task_batch(2, (3, 8, 8), 3, 3), "heads.head", ("*prompt*",))


def test_peft_adapts_the_projection_of_attention_as_we_do() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = named(attention=nn.MultiheadAttention(4, 2, batch_first=True))
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attention"])
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    ours = stir(lora(base, 2, peft=False), "lora_")
    known = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    assert known.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        known[name].data = p.data.clone()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    out = theirs.attention.base_layer.out_proj
    assert isinstance(ours.attention.base_layer.out_proj, Lora)
    for b in (out.lora_B.default.weight, ours.attention.base_layer.out_proj.lora_B.weight):
        b.data.zero_()  # peft adds this update twice
    assert relative(theirs.attention(x, x, x)[0], ours.attention(x, x, x)[0]) < 1e-12
    assert relative(ours.attention(x, x, x)[0], base.attention(x, x, x)[0]) > 1e-3


def test_where_peft_does_another_thing_our_own_adapters_are_taken() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    wide = named(
        one=nn.Conv2d(2, 4, 3, groups=2), two=nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), flat=nn.Flatten(),
        head=nn.Linear(8, 2),
    )  # fmt: skip
    for model, layers in ((wide, "one"), (wide, "two"), (words(), "*self_attn"), (words(), "*out_proj")):
        assert any(isinstance(m, Lora | LoraAttention) for m in lora(model, 2, layers).modules())
        with pytest.raises(
            UserError, match=r"^peft=True cannot be had for \S+(, \S+)*, where peft does another thing; use peft="
        ):
            lora(model, 2, layers, peft=True)
    assert not any(isinstance(m, Lora) for m in lora(wide, 2, "head").modules())


def test_folded_layers_are_plain_and_share_what_has_no_adapters() -> None:
    model = named(
        one=nn.Conv2d(1, 4, 3, stride=2, padding=1), soft=nn.Softplus(), two=nn.Conv2d(4, 6, (1, 3), groups=2, bias=False),
        three=nn.Conv2d(6, 2, 3, padding="same", padding_mode="circular", dilation=2), flat=nn.Flatten(), head=nn.Linear(16, 2),
    )  # fmt: skip
    x = task_batch(shape=(1, 8, 8)).query.x[0]
    new = stir(lora(model, 2, ("one", "two", "three", "head"), peft=False), "lora_")
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    plain = fold(new)
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert relative(plain(x), new(x)) < 1e-12 and relative(plain(x), model(x)) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in new.named_parameters()), "the adapted model is left alone"
    assert plain.head.bias is new.head.base_layer.bias and plain.two.groups == 1
    around, plain = stir(lora(words(), 2, peft=False), "lora_"), words().state_dict().keys()
    assert fold(around).state_dict().keys() == plain and relative(fold(around)(x[:, 0, 0, :3]), around(x[:, 0, 0, :3])) < 1e-12
    alone = fold(stir(lora(nn.Linear(3, 2).double(), 1, peft=False), "lora_"))
    assert type(alone) is nn.Linear


def test_adapters_of_peft_are_folded() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = named(conv=nn.Conv2d(1, 3, 3), soft=nn.Softplus(), flat=nn.Flatten(), head=nn.Linear(108, 2))
    new, x = stir(lora(model, 2, peft=True), "lora_"), task_batch(shape=(1, 8, 8)).query.x[0]
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    plain = fold(new)
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}
    assert relative(plain(x), new(x)) < 1e-12 and relative(plain(x), model(x)) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in new.named_parameters())


def test_prompts_are_tokens_that_the_blocks_see_and_nobody_else() -> None:
    given, x = looked("vision")
    new = prompted(given, 3, seed=1)
    assert dict(new.named_parameters()).keys() - dict(given.named_parameters()).keys() == {"encoder.layers.prompt"}
    stir(new, "prompt")
    tokens = given._process_input(x)
    tokens = torch.cat([given.class_token.expand(len(x), -1, -1), tokens], 1) + given.encoder.pos_embedding
    own = torch.cat([tokens[:, :1], new.encoder.layers.prompt.expand(len(x), -1, -1), tokens[:, 1:]], 1)
    expected = given.heads(given.encoder.ln(given.encoder.layers(own))[:, 0])  # in the middle, as in the paper
    assert relative(new(x), expected) < 1e-12 and relative(new(x), given(x)) > 1e-4
    drawn = [prompted(given, 3, seed).encoder.layers.prompt for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert [prompted(given.train(on), 3).encoder.layers.training for on in (True, False)] == [True, False]
    assert drawn[0].dtype == torch.float64 and not isinstance(given.encoder.layers, Prompted)


def test_prompts_in_a_vision_transformer_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    made = timm.models.vision_transformer.VisionTransformer(
        8, 4, embed_dim=4, depth=2, num_heads=2, num_classes=2, global_pool="avg"
    )
    given, x = named(body=made), looked("vision")[1]
    new = stir(prompted(given, 3), "prompt")
    assert dict(new.named_parameters()).keys() - dict(given.named_parameters()).keys() == {"body.blocks.prompt"}
    tokens = torch.cat([made._pos_embed(made.patch_embed(x)), new.body.blocks.prompt.expand(len(x), -1, -1)], 1)
    expected = made.forward_head(made.norm(made.blocks(tokens))[:, :5])
    assert relative(new(x), expected) < 1e-12 and relative(new(x), given(x)) > 1e-4


def test_prompts_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"^0 prompts; give at least 1$"):
        prompted(vision(), 0)
    with pytest.raises(
        UserError, match=r"^prompts are put into the vision transformers of .*, and Words is none; use --lora or a"
    ):
        prompted(words(), 2)
