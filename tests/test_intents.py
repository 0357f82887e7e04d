"""Intents: features of texts, the splits of CLINC150 by domain, the bag of features, and the experiment."""

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments import intents as experiment
from tests.conftest import finite_differences, mean_objective, relative, stirred
from toolkit import Batch, Learner, Task, UserError, draw
from toolkit.algorithms import maml
from toolkit.data.intents import DOMAINS, clinc150
from toolkit.data.tokens import features, rows
from toolkit.engine import Plan, gradient_function
from toolkit.models.bag import Bag, bag
from toolkit.runs.folder import Run
from toolkit.samplers import Episodes

TEXTS = ["What's my balance?", "play the next song", "", "Größe in cm, bitte", "a I 7", "...!"]


def number(part: str, buckets: int = 4096) -> int:
    return 1 + crc32(part.encode()) % (buckets - 1)


def test_features_are_the_words_then_the_ngrams_of_each_word_with_its_boundaries() -> None:
    words = ["<my>", "<cats>"]
    grams = ["<my", "my>", "<ca", "cat", "ats", "ts>"]
    assert features("My CATS!", length=10) == [number(part) for part in (*words, *grams)] + [0, 0]
    longer = ["<my", "my>", "<ca", "cat", "ats", "ts>", "<cat", "cats", "ats>"]
    assert features("my cats", 500, 11, longest=4) == [number(part, 500) for part in (*words, *longer)]
    assert features("my cats", length=4, shortest=5, longest=5) == [*map(number, (*words, "<cats", "cats>"))]


def test_feature_numbers_never_change() -> None:
    """Trained tables belong to these numbers, which were written down once."""
    assert features("what's up", 8192, 10) == NUMBERS


NUMBERS = [1773, 5592, 3384, 806, 7371, 4638, 1842, 6257, 7559, 4398]


def test_an_unknown_word_shares_features_with_words_like_it() -> None:
    seen, new, other = (set(features(text)) - {0} for text in ("reservation", "reservations", "luggage"))
    assert len(seen & new) >= 9 and len(seen & other) == 0


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("buckets", [2, 3, 4096])
def test_rows_have_their_length_and_feature_0_only_fills_the_end(text: str, buckets: int) -> None:
    row = features(text, buckets, 40)
    count = sum(n != 0 for n in row)
    assert len(row) == 40 and all(1 <= n < buckets for n in row[:count]) and not any(row[count:])
    assert (count == 0) == (not re.search(r"\w", text))
    assert features(text, buckets, 7) == row[:7], "a shorter row is the same row, cut"


def test_many_texts_give_the_rows_of_each() -> None:
    found = rows(iter(TEXTS), 300, 20, 2, 4)
    assert found.dtype == torch.int64 and found.tolist() == [features(text, 300, 20, 2, 4) for text in TEXTS]
    assert rows([], length=9).shape == (0, 9)


def test_case_apostrophes_and_punctuation_make_no_difference() -> None:
    assert features("What\u2019s up") == features("what's  up?!") != features("whats up")


@pytest.mark.parametrize("bad", [(1, 9, 3), (9, 0, 3), (9, 9, 0)])
def test_sizes_that_give_no_features_are_refused(bad: tuple[int, int, int]) -> None:
    for call in (lambda: features("a", *bad), lambda: rows(["a"], *bad)):
        with pytest.raises(UserError, match=f"^{bad[0]} buckets, rows of length {bad[1]}, n-grams of {bad[2]} char.* at least"):
            call()


def content() -> dict[str, object]:
    """A file like the real one: 10 domains of 3 intents of 12 texts each, of which two differ in punctuation only."""
    domains = {domain: [f"{domain}_{i}" for i in range(3)] for names in DOMAINS.values() for domain in names}
    found: dict[str, list[list[str]]] = {"train": [], "val": [], "test": [], "oos_test": [["nobody knows", "oos"]]}
    for domain in reversed(domains):
        for i, intent in enumerate(domains[domain]):
            texts = [f"{domain} number {i} {'abcdefghijkl'[j] * 5}" for j in range(11)] + [f"{domain} number {i}, aaaaa!"]
            for part, some in (("test", texts[9:]), ("train", texts[:6]), ("val", texts[6:9])):
                found[part] += [[text, intent] for text in some]
    found["test"].append(["meta number 1 ccccc", "meta_2"])
    return {**found, "domains": domains}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "clinc150.json.gz").write_bytes(gzip.compress(json.dumps(content()).encode()))
    return tmp_path


def test_splits_are_whole_domains_in_their_order_and_hold_every_text_of_an_intent(root: Path) -> None:
    banks = {split: clinc150(split, root, length=40) for split in DOMAINS}
    for split, bank in banks.items():
        assert bank.names == tuple(f"{domain}/{domain}_{i}" for domain in DOMAINS[split] for i in range(3))
        assert bank.source == f"clinc150 {split}" and bank.items.dtype == torch.int64 and bank.items.shape[1] == 40
        assert bank.sizes.tolist() == [11] * bank.classes, "the text that repeats another is left out"
        for c, name in enumerate(bank.names):
            domain, i = name.split("/")[0], name[-1]
            of_class = bank.read(torch.arange(int(bank.first[c]), int(bank.first[c + 1])))
            expected = [features(f"{domain} number {i} {letter * 5}", length=40) for letter in "abcdefghijk"]
            assert of_class.tolist() == expected
    assert [bank.classes for bank in banks.values()] == [15, 6, 9]
    assert len({name for bank in banks.values() for name in bank.names}) == 30


def test_no_row_is_twice_in_a_split_even_under_two_intents(root: Path) -> None:
    for split in DOMAINS:
        items = clinc150(split, root).items
        assert len(items.unique(dim=0)) == len(items)


def test_settings_reach_the_features(root: Path) -> None:
    bank = clinc150("val", root, length=9, buckets=50, shortest=2, longest=2)
    assert bank.items[0].tolist() == features("meta number 0 aaaaa", 50, 9, 2, 2)


def damaged(kind: str) -> bytes:
    whole = content()
    packed = gzip.compress(json.dumps(whole).encode())
    if kind == "flipped":
        return packed[:200] + bytes([packed[200] ^ 255]) + packed[201:]
    if kind == "cut":
        return packed[:-300]
    if kind == "no gzip":
        return b"{}"
    if kind == "no json":
        return gzip.compress(b"{")
    if kind == "a list":
        return gzip.compress(b"[]")
    if kind == "no texts":
        return gzip.compress(json.dumps({"domains": whole["domains"]}).encode())
    if kind == "other rows":
        return gzip.compress(json.dumps({**whole, "val": [["a", "b", "c"]]}).encode())
    if kind == "unknown intent":
        return gzip.compress(json.dumps({**whole, "val": [["a", "b"]]}).encode())
    return gzip.compress(json.dumps({"train": [], "val": [], "test": [], "domains": {"meta": ["yes"]}}).encode())


KINDS = ["flipped", "cut", "no gzip", "no json", "a list", "no texts", "other rows", "unknown intent", "few domains"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clinc150.json.gz"
    path.write_bytes(damaged(kind))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is (damaged or )?not clinc150.json.gz.*; copy it anew$"):
        clinc150("train", tmp_path)


def test_no_file_and_an_unknown_split_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no .*clinc150.json.gz; give the folder that holds .* with --data-root$"):
        clinc150("train", tmp_path)
    with pytest.raises(UserError, match="unknown split 'valid'; did you mean 'val'"):
        clinc150("valid", tmp_path)


REAL = os.environ.get("TOOLKIT_DATA")


@pytest.mark.skipif(not REAL, reason="set TOOLKIT_DATA to the folder with clinc150.json.gz")
def test_the_real_splits_have_75_30_and_45_intents_and_share_no_row() -> None:
    banks = {split: clinc150(split, str(REAL)) for split in DOMAINS}
    assert [(bank.classes, bank.entries) for bank in banks.values()] == COUNTS
    assert min(int(bank.sizes.min()) for bank in banks.values()) >= 135
    items = torch.cat([bank.items for bank in banks.values()])
    assert len(items.unique(dim=0)) == len(items) == sum(entries for _, entries in COUNTS)


COUNTS = [(75, 11240), (30, 4443), (45, 6750)]


def toy(depth: int = 0, buckets: int = 9) -> torch.nn.Sequential:
    return bag((5,), 2, seed=1, width=3, features=buckets, depth=depth, reach=2.0).double()


def toy_tasks() -> Task:
    """Three tasks of texts of five features below 9: with filling, with repeats, and with a text that has none."""
    g = torch.Generator().manual_seed(2)

    def batch(n: int) -> Batch:
        x = torch.randint(9, (3, n, 5), generator=g).sort(-1, descending=True).values
        x[1, 0] = 0
        x[2, 1] = torch.tensor([4, 4, 4, 0, 0])
        return Batch(x, torch.randint(2, (3, n), generator=g))

    return Task(batch(4), batch(6))


def test_a_bag_is_the_direction_of_the_summed_embeddings() -> None:
    layer = Bag(9, 3, 2.0)
    total = layer.table.weight[3] + 2 * layer.table.weight[5]
    found = layer(torch.tensor([[3, 5, 5, 0], [5, 3, 5, 0]]))
    torch.testing.assert_close(found, (2 * total / total.norm()).expand(2, 3))


def test_filling_counts_nowhere() -> None:
    network, x = toy(), torch.tensor([[3, 5, 5]])
    filled = torch.tensor([[3, 5, 5, 0, 0, 0]])
    before = network(x)
    torch.testing.assert_close(network(filled), before, rtol=0, atol=0)
    network(filled).sum().backward()
    table = network.get_parameter("body.bag.table.weight")
    assert table.grad is not None and not table.grad[0].any() and table.grad[3].any()
    with torch.no_grad():
        table[0] += 100
    torch.testing.assert_close(network(filled), before, rtol=0, atol=0)


def test_both_integer_types_give_the_same() -> None:
    x = torch.tensor([[3, 5, 0]])
    assert torch.equal(toy()(x), toy()(x.int()))


def test_a_text_without_features_is_0_and_has_a_finite_second_derivative() -> None:
    layer, x = Bag(9, 3, 2.0), torch.zeros(1, 4, dtype=torch.int64)
    assert not layer(x).any()
    (first,) = torch.autograd.grad(layer(x).square().sum(), layer.table.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), layer.table.weight)
    assert first.isfinite().all() and second.isfinite().all()


def learner(depth: int) -> Learner:
    return maml(toy(depth), inner_lr=0.7, inner_steps=2)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_meta_gradient_through_embeddings_is_exact_under_vmap(depth: int) -> None:
    tasks, method = toy_tasks(), learner(depth)
    meta = stirred(method)
    expected = finite_differences(mean_objective(method, tasks), meta)
    for plan in (Plan("vmap"), Plan("loop"), Plan("vmap", memory="recompute")):
        grads, _ = gradient_function(method, plan)(meta, tasks)
        assert relative(grads, expected) < 1e-6
        assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves(grads))
    by_loop, _ = gradient_function(method, Plan("loop"))(meta, tasks)
    by_vmap, _ = gradient_function(method, Plan("vmap"))(meta, tasks)
    assert relative(by_vmap, by_loop) < 1e-12
    first, _ = gradient_function(replace(method, order=0), Plan("vmap"))(meta, tasks)
    assert relative(first, expected) > 1e-3, "the tasks tell second from first order"


def test_a_bag_has_named_parts_and_weights_of_its_seed_alone() -> None:
    one = dict(bag((5,), 4, seed=3, depth=1).named_parameters())
    torch.manual_seed(9)
    two = dict(bag((5,), 4, seed=3, depth=1).named_parameters())
    assert list(one) == ["body.bag.table.weight", "body.layer0.weight", "body.layer0.bias", "head.weight", "head.bias"]
    assert all(torch.equal(one[name], two[name]) for name in one) and one["head.weight"].shape[0] == 4
    assert not torch.equal(one["head.weight"], bag((5,), 4, seed=4).get_parameter("head.weight"))
    assert 0.98 < one["body.bag.table.weight"].std() < 1.02


@pytest.mark.parametrize("bad", [{"width": 0}, {"outputs": 0}, {"features": 1}, {"depth": -1}, {"reach": 0.0}])
def test_sizes_that_make_no_bag_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="make no bag; give"):
        bag(**{"inputs": (5,), "outputs": 2} | bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rows of feature numbers, but an example has shape \(1, 28, 28\)"):
        bag((1, 28, 28), 2)


def test_episodes_hold_the_features_as_they_are(root: Path) -> None:
    tasks: Task = draw(Episodes(clinc150("test", root), 5, 2, 3), 4, seed=0)
    x = tasks.support.x
    assert isinstance(x, Tensor) and x.shape == (4, 10, 64) and x.dtype == torch.int64


@pytest.mark.parametrize("algorithm", ["maml", "protonet", "anil"])
def test_a_short_run_of_the_experiment_fills_its_folder(root: Path, tmp_path: Path, algorithm: str) -> None:
    config = experiment.Config(
        algorithm=algorithm, sampler="toolkit.data.intents:clinc150", data_root=root, shots=2, queries=3, eval_queries=5,
        iterations=4, validate_every=2, val_tasks=4, eval_tasks=5, eval_steps=2, tasks=2, out=tmp_path / "run",
    )  # fmt: skip
    experiment.main(config)
    run = Run(tmp_path / "run")
    assert run.summary["chance"] == 0.2 and run.summary["algorithm"] == algorithm
    assert {"summary.json", "adaptation.png", "training.png"} <= {path.name for path in run.path.iterdir()}
