"""Tensors, other people's datasets and pickles as class banks: right items under right labels, one sentence for what is not."""

import hashlib
import io
import os
import pickle
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from toolkit import UserError, draw
from toolkit.data.bank import ClassBank
from toolkit.data.convert import from_dataset, from_tensors
from toolkit.data.pickles import load, pickled
from toolkit.samplers import Episodes

LABELS = [2, 0, 1, 0, 2, 2, 1, 0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def images(count: int = 8, shape: tuple[int, ...] = (3, 4, 4)) -> Tensor:
    """uint8 images, each different from the others."""
    return torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Listed:
    """A map-style dataset of the given items and labels that counts how often it is read."""

    def __init__(self, items: Any, own: Any, **attributes: Any) -> None:
        self.items, self.own, self.reads = items, own, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        self.reads += 1
        return self.items[i], self.own[i]


def entries(bank: ClassBank) -> list[Tensor]:
    """The items of each class."""
    return [bank.read(torch.arange(int(bank.first[c]), int(bank.first[c + 1]))) for c in range(bank.classes)]


def assert_sorted(bank: ClassBank, x: Tensor, labels: list[int]) -> None:
    for number, label in enumerate(sorted(set(labels))):
        assert torch.equal(entries(bank)[number], x[torch.tensor([own == label for own in labels])])


@pytest.mark.parametrize("y", [torch.tensor(LABELS), torch.tensor(LABELS)[:, None], torch.tensor(LABELS, dtype=torch.uint8)])
def test_tensors_become_entries_sorted_by_class_in_their_order(y: Tensor) -> None:
    x = images()
    bank = from_tensors(x, y)
    assert_sorted(bank, x, LABELS)
    assert bank.names == ("0", "1", "2")
    assert bank.items.data_ptr() == x.data_ptr()
    assert from_tensors(x, y.sort(dim=0).values).rows is None


def test_a_bank_from_tensors_gives_episodes() -> None:
    bank = from_tensors(images(), torch.tensor(LABELS))
    task = draw(Episodes(bank, ways=2, shots=1, queries=1), 3, seed=0)
    assert task.support.x.shape == (3, 2, 3, 4, 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3, 6, 9, 11, 0, 0], "go from 0 to 11 but leave out 2, 4, 5 and 3 more; .*relabel=True"),
        ([0, 2, 2, 2, 0, 0, 0, 0], "go from 0 to 2 but leave out 1;"),
        ([0, 1, -1, 2, 0, 0, 0, -7], "negative, as -1 of item 2; .*relabel=True"),
        ([0.0, 1.0, 0.0, 2.5, 0.0, 0.0, 0.0, 0.0], "no integers, as 2.5 of item 3; .*relabel=True"),
        ([0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0], "no integers, as 0.0 of item 0"),
        (["cat", "dog", *["cat"] * 6], "no integers, as 'cat' of item 0"),
        ([[0, 1]] * 8, r"have shape \(8, 2\); give each item one label"),
        ([[0]] * 7 + [[1, 2]], "differ in shape"),
        ([None] * 8, "no integers, as None of item 0"),
    ],
)
def test_wrong_labels_are_refused_by_name(labels: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dataset(Listed(images(), labels), source="mine")
    if isinstance(labels[0], int | float):
        with pytest.raises(UserError, match=f"the labels of tensors .*{message}"):
            from_tensors(images(), torch.tensor(labels))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([7, 3, 3, 9, 7, 7, 9, 3], ("3", "7", "9")),
        ([0, -1, -1, 5, 0, 0, 5, -1], ("-1", "0", "5")),
        ([1.5, 0.5, 0.5, 2.5, 1.5, 1.5, 2.5, 0.5], ("0.5", "1.5", "2.5")),
        (["b", "a", "a", "c", "b", "b", "c", "a"], ("a", "b", "c")),
    ],
)
def test_relabel_numbers_the_distinct_labels_anew(labels: list[Any], names: tuple[str, ...]) -> None:
    x = images()
    bank = from_dataset(Listed(x, labels), relabel=True)
    assert bank.names == names
    assert_sorted(bank, x, labels)


@pytest.mark.parametrize(
    ("labels", "given", "relabel", "expected"),
    [
        (LABELS, ["a", "b", "c"], False, ("a", "b", "c")),
        ([5, 1, 3, 1, 5, 5, 3, 1], list("uvwxyz"), True, ("v", "x", "z")),
        ([5, 1, 3, 1, 5, 5, 3, 1], list("uvw"), True, ("u", "v", "w")),
    ],
)
def test_names_belong_to_labels(labels: list[int], given: list[str], relabel: bool, expected: tuple[str, ...]) -> None:
    assert from_tensors(images(), torch.tensor(labels), given, relabel=relabel).names == expected
    assert from_dataset(Listed(images(), labels, classes=given), relabel=relabel).names in (expected, ("1", "3", "5"))


@pytest.mark.parametrize("given", [["a", "b"], ["a", "b", "c", "d"]])
def test_names_that_do_not_fit_the_classes_are_refused(given: list[str]) -> None:
    with pytest.raises(UserError, match=f"{len(given)} names do not fit 3 classes of tensors"):
        from_tensors(images(), torch.tensor(LABELS), given)


@pytest.mark.parametrize(
    "pair",
    [(images(), torch.tensor(LABELS[:-1])), (images().numpy(), torch.tensor(LABELS)), (images(), torch.tensor(1))],
)
def test_tensors_that_do_not_fit_together_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"tensors: x and y are .*; give two tensors, one label for each item"):
        from_tensors(*pair)


def hwc(x: Tensor) -> Any:
    return x.permute(0, 2, 3, 1).numpy()


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tensor, channels last": lambda x: x.permute(0, 2, 3, 1),
    "numpy": hwc,
    "numpy, channels first": lambda x: x.numpy(),
    "PIL": lambda x: [Image.fromarray(pixels) for pixels in hwc(x)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor, lambda n: np.array([n]), lambda n: torch.tensor([n])])
def test_images_of_any_form_become_channels_first_under_their_labels(form: str, label: Callable[[int], Any]) -> None:
    x = images()
    bank = from_dataset(Listed(FORMS[form](x), [label(n) for n in LABELS]))
    assert bank.items.dtype == torch.uint8
    assert bank.source == "Listed"
    assert_sorted(bank, x, LABELS)


def test_an_array_of_three_by_width_by_three_is_read_as_its_kind_usually_is() -> None:
    x = images(2, (3, 5, 3))
    assert from_dataset(Listed(x, [0, 1])).items.shape[1:] == (3, 5, 3)
    assert torch.equal(from_dataset(Listed(x, [0, 1])).items, x)
    assert torch.equal(from_dataset(Listed(x.numpy(), [0, 1])).items, x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["tensor", "numpy", "PIL"])
def test_greyscale_images_get_one_channel(kind: str) -> None:
    x = images(shape=(4, 4))
    items = {"tensor": x, "numpy": x.numpy(), "PIL": [Image.fromarray(pixels) for pixels in x.numpy()]}[kind]
    assert torch.equal(from_dataset(Listed(items, LABELS)).items, x[:, None])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 4), ()])
def test_other_arrays_and_floats_stay_as_they_are(shape: tuple[int, ...]) -> None:
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_dataset(TensorDataset(x, torch.tensor(LABELS))).items, x)
    assert torch.equal(from_dataset(Listed(x.double(), LABELS)).items, x.double())
    with pytest.raises(UserError, match=r"item 0 of Listed has shape .* and is no image; leave size and channels out"):
        from_dataset(Listed(x, LABELS), size=8)


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)]
)
def test_every_mode_of_pil_becomes_grey_or_colour(mode: str, channels: int) -> None:
    picture = Image.fromarray(hwc(images(1))[0]).convert(mode)
    expected = np.array(picture.convert("RGB"))
    items = from_dataset(Listed([picture], [0])).items
    assert items.shape == (1, channels, 4, 4)
    if channels == 3:
        assert torch.equal(items[0], torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize(("mode", "ink"), [("RGBA", (0, 0, 0, 255)), ("LA", (0, 255))])
def test_what_is_transparent_is_white(mode: str, ink: Any) -> None:
    """Black ink on a transparent ground, whose colour is black as well, is a picture and not a black square."""
    picture = Image.new(mode, (4, 4), (0,) * len(ink))
    picture.putpixel((1, 2), ink)
    expected = torch.full((len(ink) - 1, 4, 4), 255, dtype=torch.uint8)
    expected[:, 2, 1] = 0
    assert torch.equal(from_dataset(Listed([picture], [0])).items[0], expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_arrays_of_two_or_four_channels_have_them_last(channels: int) -> None:
    x = images(shape=(channels, 6, 5))
    assert torch.equal(from_dataset(Listed(hwc(x), LABELS)).items, x)
    assert from_dataset(Listed(hwc(x), LABELS), size=3).items.shape == (8, channels, 3, 3)


def test_resized_masks_and_whole_numbers_are_rounded_to_what_they_may_be() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, :2] = True
    found = from_dataset(Listed([mask], [0]), size=4).items[0]
    assert found.dtype == torch.bool and found[0].sum(1).tolist() == [1] * 4
    steps = torch.tensor([0, 255, 0, 255, 0, 255, 0, 255], dtype=torch.int16).expand(1, 8, 8)
    exact = from_dataset(Listed([steps.float()], [0]), size=5).items
    assert torch.equal(from_dataset(Listed([steps], [0]), size=5).items, exact.round().short())
    assert not torch.equal(exact.short(), exact.round().short())


def test_more_than_eight_bits_are_refused_rather_than_cut_off() -> None:
    with pytest.raises(UserError, match="item 0 of Listed has pixels of PIL's mode 'I;16', more than 8 bits"):
        from_dataset(Listed([Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16))], [0]))


def test_grey_mixed_with_colour_needs_channels() -> None:
    grey, colour = images(shape=(4, 4)).numpy(), hwc(images())
    for items in ([colour[0], grey[0]], [Image.fromarray(colour[0]), Image.fromarray(grey[0])]):
        with pytest.raises(
            UserError, match=r"item 1 of Listed has 1 channels and item 0 has 3; give channels=3, .* or channels=1"
        ):
            from_dataset(Listed(items, [0, 1]))
        three, one = (from_dataset(Listed(items, [0, 1]), channels=n).items for n in (3, 1))
        assert torch.equal(three[0], torch.from_numpy(colour[0]).permute(2, 0, 1))
        assert torch.equal(three[1], torch.from_numpy(grey[0]).expand(3, 4, 4))
        assert torch.equal(one[1], torch.from_numpy(grey[0])[None])
        expected = torch.from_numpy(np.array(Image.fromarray(colour[0]).convert("L")))
        assert (one[0, 0].int() - expected.int()).abs().max() <= 1
    with pytest.raises(UserError, match="has 3 channels, and channels=2 is asked for"):
        from_dataset(Listed(images(), LABELS), channels=2)


@pytest.mark.parametrize("form", ["tensor", "numpy", "PIL", "float"])
def test_images_of_unequal_size_need_size_and_are_resized_by_lanczos(form: str) -> None:
    pictures = [images(1, (3, 20, 14))[0], images(1, (3, 9, 9))[0]]
    make: Callable[[Tensor], Any] = {"float": lambda x: x[0] / 255}.get(form) or (lambda x: FORMS[form](x)[0])
    items = [make(picture[None]) for picture in pictures]
    with pytest.raises(UserError, match="item 1 of Listed is 9 x 9 and item 0 is 20 x 14; give size=84, say, to resize"):
        from_dataset(Listed(items, [0, 1]))
    found = from_dataset(Listed(items, [0, 1]), size=9).items
    expected = Image.fromarray(hwc(pictures[0][None])[0]).resize((9, 9), Image.Resampling.LANCZOS)
    scale = 255 if form == "float" else 1
    difference = found[0].permute(1, 2, 0).double().numpy() * scale - np.array(expected).astype(float)
    inside = (np.array(expected) > 0) & (np.array(expected) < 255)  # floats overshoot where bytes are clipped
    assert np.abs(difference[inside]).max() <= (1.5 if form == "float" else 0)
    assert torch.equal(found[1], pictures[1] if form != "float" else pictures[1] / 255)


def test_items_of_several_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match=r"item 1 of Listed is torch.float32 and item 0 is torch.uint8"):
        from_dataset(Listed([images()[0], images()[1].float()], [0, 1]))


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels", "y"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_listed_labels_are_judged_before_more_than_one_image_is_read(attribute: str, kind: Callable[[Any], Any]) -> None:
    labels = [*LABELS[:-1], 4]
    dataset = Listed(images(), labels, **{attribute: kind(labels)})
    with pytest.raises(UserError, match="leave out 3"):
        from_dataset(dataset)
    assert dataset.reads == 1


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [5, 6, 7]},
        {"targets": [9] * 8},
        {"labels": torch.tensor(3)},
        {"labels": ["cat"] * 8},
        {"targets": [2, -1, 1, 0, 2, 2, 1, 0], "target_transform": abs},
        {"y": None},
    ],
)
def test_lists_that_are_not_the_labels_do_not_count(attributes: dict[str, Any]) -> None:
    dataset = Listed(images(), LABELS, **attributes)
    assert_sorted(from_dataset(dataset), images(), LABELS)
    assert dataset.reads == 8


def test_parts_and_unions_of_datasets_are_datasets() -> None:
    x = images()
    dataset = Listed(x, LABELS, targets=LABELS)
    index = [1, 2, 3, 6]
    assert_sorted(from_dataset(Subset(dataset, index)), x[index], [LABELS[i] for i in index])  # type: ignore[arg-type]
    both: Any = ConcatDataset([dataset, dataset])  # type: ignore[list-item]
    assert_sorted(from_dataset(both), torch.cat([x, x]), LABELS * 2)
    assert_sorted(from_dataset(list(zip(x, LABELS, strict=True))), x, LABELS)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(images(), LABELS, strict=True))


class Broken(Listed):
    def __getitem__(self, i: int) -> tuple[Any, Any]:
        if i == 5:
            raise OSError("image file is truncated")
        return super().__getitem__(i)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "Stream has no length or no index"),
        (iter([]), "has no length or no index"),
        ([], "list is empty"),
        (Broken(images(), LABELS), r"item 5 of Broken cannot be read .*\(OSError: image file is truncated\)"),
        (images(), "item 0 of Tensor cannot be read as an"),
        (Listed(["a.png"], [0]), "item 0 of Listed is a str; an item is a PIL image"),
    ],
)
def test_what_is_no_dataset_of_images_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dataset(dataset)


def test_memory_at_the_peak_is_the_bank_and_ten_per_cent() -> None:
    count, shape = 400, (100, 100)

    class Made:
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int) -> tuple[Any, int]:
            return np.full(shape, i % 200, dtype=np.float64), i % 20

    before = torch.empty(0)
    allocated: list[int] = []
    real = torch.empty

    def counting(*size: Any, **options: Any) -> Tensor:
        made = real(*size, **options)
        allocated.append(made.nbytes)
        return made

    torch.empty = counting  # type: ignore[assignment]
    tracemalloc.start()
    try:
        bank = from_dataset(Made())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        torch.empty = real
    whole = count * shape[0] * shape[1] * 8
    assert bank.items.nbytes == whole and before.numel() == 0
    assert sum(allocated) + peak < 1.1 * whole  # numpy's and Python's share is traced, torch's is what it allocated


# Pickles


def pickle_of(tmp_path: Path, content: Any, protocol: int = 2, name: str = "data.pkl") -> tuple[Path, str]:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (tmp_path / name).write_bytes(data)
    return tmp_path / name, hashlib.sha256(data).hexdigest()


def arrays() -> dict[str, Any]:
    return {
        "uint8": images(4).numpy(),
        "columns first": np.asfortranarray(images(4, (3, 5)).numpy()),
        "big end": np.arange(5, dtype=">i4"),
        "float": np.linspace(0, 1, 7),
        "empty": np.zeros((0, 3)),
        "texts": np.array(["n01", "n0234"]),
        "scalar": np.int64(5),
        "dtype": np.dtype("float32"),
        "more": [1, 2.5, "text", b"bytes", None, True, (np.arange(3), [np.arange(2)]), {1, 2}],
        "ordered": OrderedDict(b=np.arange(2), a=1),
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(b, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back_as_they_were(tmp_path: Path, protocol: int) -> None:
    assert_same(load(*pickle_of(tmp_path, arrays(), protocol)), arrays())


@pytest.mark.parametrize("old", [True, False])
def test_pickles_of_numpy_1_and_2_are_read(tmp_path: Path, old: bool) -> None:
    names = (b"numpy._core", b"numpy.core") if old else (b"numpy.core", b"numpy._core")
    data = pickle.dumps(images(4).numpy(), 2).replace(*names)
    assert names[1] in data
    assert_same(load(*pickle_of(tmp_path, data)), images(4).numpy())


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    # What Python 2 and numpy write for {'data': array([[1, 200]], dtype=uint8)} with protocol 2, texts and bytes being one.
    data = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01K\x02\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\xc8tbs."
    )
    assert_same(load(*pickle_of(tmp_path, data)), {"data": np.array([[1, 200]], dtype=np.uint8)})


class Runs:
    def __init__(self, act: Callable[..., Any], *arguments: Any) -> None:
        self.act, self.arguments = act, arguments

    def __reduce__(self) -> Any:
        return self.act, self.arguments


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda mark: Runs(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: {"data": images().numpy(), "labels": [Runs(os.system, f"touch {mark}")]}, "posix.system"),
        (lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"), "builtin.*eval"),
        (lambda mark: Runs(getattr, Runs, "act"), "builtin.*getattr"),
        (lambda mark: b"c__builtin__\ngetattr\n.", "builtin.*getattr"),
        (lambda mark: Runs(np.load, str(mark)), "numpy.*load"),
        (lambda mark: pickle.dumps(Runs(os.system, f"touch {mark}"), 0), "posix"),
        (lambda mark: random.Random(0), "random"),
        (lambda mark: torch.zeros(1), "torch"),
        (lambda mark: b"cbuiltins\nexec\n(S'open(\"" + str(mark).encode() + b'", "w")\'\ntR.', "builtins.exec"),
        (lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.", "os.system"),
        (lambda mark: b"cnumpy.core.multiarray\n_reconstruct\n(dS'__code__'\nI0\nsb.", None),
    ],
)
def test_a_pickle_that_runs_code_is_refused_even_with_the_right_hash(
    tmp_path: Path, content: Callable[[Path], Any], name: str | None
) -> None:
    mark = tmp_path / "was-here"
    path, pinned = pickle_of(tmp_path, content(mark))
    if name is None:
        load(path, pinned)  # changes what stands for the name, this once
        assert_same(load(*pickle_of(tmp_path, images(4).numpy())), images(4).numpy())
    else:
        with pytest.raises(UserError, match=f"asks for .*{name}.*nothing was run"):
            load(path, pinned)
    assert not mark.exists()


@pytest.mark.parametrize("dtype", [object, "M8[s]", [("a", "O")], [("a", "i4")]])
def test_arrays_of_other_things_than_numbers_and_texts_are_refused(tmp_path: Path, dtype: Any) -> None:
    path, pinned = pickle_of(tmp_path, np.zeros(2, dtype=dtype))
    with pytest.raises(UserError, match=r"no readable pickle of arrays .*only numbers and texts are read"):
        load(path, pinned)


def test_the_state_of_a_dtype_cannot_turn_bytes_into_objects(tmp_path: Path) -> None:
    dtype = b"cnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'|'\nNN(S'O'\nttI-1\nI-1\nI63\ntb"
    path, pinned = pickle_of(tmp_path, dtype + b".")
    with pytest.raises(UserError, match="no readable pickle"):
        load(path, pinned)
    whole = b"cnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb."
    assert load(*pickle_of(tmp_path, whole)) == np.dtype("i8")


def test_a_file_without_its_pinned_hash_is_never_opened_as_a_pickle(tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    path, found = pickle_of(tmp_path, Runs(os.system, f"touch {mark}"))
    with pytest.raises(UserError, match=f"data.pkl has the SHA-256 {found} and not {'0' * 64}; it is damaged or another file"):
        load(path, "0" * 64)
    with pytest.raises(UserError, match=f"read only when its SHA-256 is pinned; .* give sha256={found}"):
        load(path, "")
    assert not mark.exists()


@pytest.mark.parametrize("kept", [0, 10, 100, -1])
def test_a_truncated_pickle_is_one_sentence(tmp_path: Path, kept: int) -> None:
    path, pinned = pickle_of(tmp_path, pickle.dumps(arrays(), 2)[:kept])
    with pytest.raises(UserError, match=r"no readable pickle of arrays .*; get it anew"):
        load(path, pinned)


def test_a_missing_pickle_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.pkl cannot be read"):
        load(tmp_path / "nothing.pkl", "0")
    with pytest.raises(UserError, match=r"there is no .*mini-imagenet-cache-val.pkl; give the folder"):
        pickled("val", tmp_path, sha256="0")


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "mini-ImageNet": lambda x: {"image_data": x, "class_dict": {"n7": [1, 3], "n3": [0, 2, 5], "n5": [4]}},
    "CIFAR-FS": lambda x: {"data": x, "labels": [30, 7, 30, 7, 50, 30]},
    "FC100": lambda x: {"images": x, "labels": np.array([30, 7, 30, 7, 50, 30])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 1, None])
def test_pickled_sets_become_banks(tmp_path: Path, layout: str, channels: int | None) -> None:
    x = images(6, (channels or 1, 5, 4))
    stored = hwc(x) if channels else hwc(x)[..., 0]
    _, pinned = pickle_of(tmp_path, LAYOUTS[layout](stored), name="set_train.pkl")
    for _ in range(2):  # made, and from the cache
        bank = pickled("train", tmp_path, "set_{split}.pkl", pinned)
        assert bank.names == (("n7", "n3", "n5") if layout == "mini-ImageNet" else ("7", "30", "50"))
        assert bank.source == "set_train.pkl"
        for found, index in zip(entries(bank), [[1, 3], [0, 2, 5], [4]], strict=True):
            assert torch.equal(found, x[index])


def test_tiered_images_are_png_files_with_labels_of_their_own(tmp_path: Path) -> None:
    x = images(4)
    files = []
    for i, pixels in enumerate(hwc(x)):
        Image.fromarray(pixels).save(held := io.BytesIO(), "png")
        data = np.frombuffer(held.getvalue(), dtype=np.uint8)
        files.append(data if i % 2 else data[:, None])
    _, pinned = pickle_of(tmp_path, files, name="train_images_png.pkl")
    labels = {"label_general": np.zeros(4), "label_specific": np.array([3, 2, 3, 2])}
    _, second = pickle_of(tmp_path, labels, name="train_labels.pkl")
    bank = pickled("train", tmp_path, "{split}_images_png.pkl", pinned, "{split}_labels.pkl", second)
    assert bank.names == ("2", "3")
    assert torch.equal(entries(bank)[0], x[[1, 3]]) and torch.equal(entries(bank)[1], x[[0, 2]])


def test_files_and_hashes_may_differ_by_split(tmp_path: Path) -> None:
    content = {"data": hwc(images(2)), "labels": [0, 1]}
    _, train = pickle_of(tmp_path, content, name="a.pkl")
    _, val = pickle_of(tmp_path, content | {"labels": [4, 4]}, name="validation.pkl")
    files, hashes = "train=a.pkl,val=validation.pkl", {"train": train, "val": val}
    assert pickled("train", tmp_path, files, hashes).names == ("0", "1")
    assert pickled("val", tmp_path, files, f"train={train}, val={val}").names == ("4",)
    with pytest.raises(UserError, match="given for train, val but not for test"):
        pickled("test", tmp_path, files, hashes)
    with pytest.raises(UserError, match="unknown split 'tst'; did you mean 'test'"):
        pickled("tst", tmp_path, files, hashes)
    with pytest.raises(UserError, match=r"a.pkl is a pickle, which is read only when .* give sha256="):
        pickled("train", tmp_path, files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((2, 4, 4, 3), dtype=np.uint8)}, "holds data; a data set is"),
        ({"data": np.zeros((2, 4, 4, 3), dtype=np.uint8), "labels": [1]}, "holds data, labels; a data set is"),
        ({"data": np.zeros((2, 4, 4, 3), dtype=np.float32), "labels": [0, 1]}, "item 0 of .* is float32"),
        (
            {"data": [np.zeros((4, 4), dtype=np.uint8), np.zeros((5, 4), dtype=np.uint8)], "labels": [0, 1]},
            "must have one size",
        ),
        ({"image_data": np.zeros((2, 4, 4, 3), dtype=np.uint8), "class_dict": {"a": [0]}}, "holds image_data, class_dict"),
    ],
)
def test_pickles_of_another_layout_are_refused_and_nothing_is_kept(tmp_path: Path, content: Any, message: str) -> None:
    _, pinned = pickle_of(tmp_path, content, name="set.pkl")
    with pytest.raises(UserError, match=message):
        pickled("train", tmp_path, "set.pkl", pinned)
    assert not (tmp_path / "cache").exists()
