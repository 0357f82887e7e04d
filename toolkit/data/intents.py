"""CLINC150: what people ask an assistant for, in a sentence, in 150 intents of 10 domains (Larson et al. 2019, EMNLP-IJCNLP).

The splits take whole domains, so that a test task asks about things that training never heard of:

    train  banking, credit_cards, home, utility, work               75 intents
    val    meta, small_talk                                         30 intents
    test   auto_and_commute, kitchen_and_dining, travel             45 intents

They are the toolkit's own (the paper has none by domain), chosen before any training so that kindred domains, such as banking
and credit cards, or small talk and the assistant's settings (meta), stay on one side. The out-of-scope texts are not used.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from toolkit.data import wordpieces
from toolkit.data.bank import ClassBank, Tokens
from toolkit.data.tokens import HASHED, rows
from toolkit.data.wordpieces import tokens_of
from toolkit.errors import UserError, unknown

FILE = "clinc150.json.gz"
DOMAINS = {
    "train": ("banking", "credit_cards", "home", "utility", "work"),
    "val": ("meta", "small_talk"),
    "test": ("auto_and_commute", "kitchen_and_dining", "travel"),
}
Texts = dict[str, list[str]]


def clinc150(
    split: str, data_root: str | Path = "data", length: int = 64, buckets: int = 4096, shortest: int = 3, longest: int = 3
) -> ClassBank:
    """CLINC150: intents of whole domains, named "domain/intent", each text a row of `length` feature numbers (int64).

    `length`, `buckets`, `shortest` and `longest` are those of `toolkit.data.tokens.features`. An intent has 150 texts
    (100, 20 and 30 of the paper's own splits, which share all intents and play no part here), less those that repeat an earlier
    text of the split feature by feature, so that no text is in a task twice: 67 of the 22,500, none of them in the test split.

    Reads `clinc150.json.gz` in `data_root`: the paper's data_full.json with its domains.json as the entry "domains", gzipped.
    Raises UserError for an unknown split and for a file that is not there, is damaged or is another.
    """
    return _bank(split, Path(data_root) / FILE, HASHED, "", rows, (buckets, length, shortest, longest))


def clinc150_wordpieces(split: str, data_root: str | Path = "data", tokenizer: str = "minilm", length: int = 24) -> ClassBank:
    """CLINC150 as a language model reads it: as `clinc150`, but each text is a row of `length` token numbers of `tokenizer`:
    `minilm`, the folder of a model, or `owner/model` of the hub of Hugging Face (see `wordpieces.rows`).

    Of MiniLM's 24 tokens, two are the ends of a text; in the test split 0.7 % of the texts have more, and lose the last.
    """
    how = f" in word pieces of {tokenizer}"
    return _bank(split, Path(data_root) / FILE, tokens_of(tokenizer), how, wordpieces.rows, (tokenizer, length))


@cache
def _bank(
    split: str, path: Path, tokens: Tokens | None, how: str, rows: Callable[..., Tensor], settings: tuple[int | str, ...]
) -> ClassBank:
    """All texts of a split, as `rows` of them."""
    if split not in DOMAINS:
        raise unknown("split", split, DOMAINS)
    intents = {
        name: texts
        for domain in DOMAINS[split]
        for name, texts in texts_by_intent(path).items()
        if name.startswith(f"{domain}/")
    }
    x = rows((text for texts in intents.values() for text in texts), *settings)
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(x.tolist()):
        seen.setdefault(tuple(row), i)
    kept = torch.tensor(list(seen.values()))
    ends = torch.tensor([0, *map(len, intents.values())]).cumsum(0)
    return ClassBank(x[kept], torch.searchsorted(kept, ends), tuple(intents), f"clinc150 {split}{how}", tokens=tokens)


@cache
def texts_by_intent(path: Path) -> Texts:
    """All texts of `clinc150.json.gz`, in the order of the file, by "domain/intent"; raises UserError as `clinc150`."""
    if not path.exists():
        raise UserError(f"there is no {path}; give the folder that holds {FILE} with --data-root")
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        domain_of = {intent: domain for domain, intents in content["domains"].items() for intent in intents}
        found: Texts = {f"{domain}/{intent}": [] for intent, domain in domain_of.items()}
        for part in ("train", "val", "test"):
            for text, intent in content[part]:
                found[f"{domain_of[intent]}/{intent}"].append(text)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not {FILE} ({type(error).__name__}: {error}); copy it anew") from None
    wanted = {domain for domains in DOMAINS.values() for domain in domains}
    if missing := sorted(wanted - set(domain_of.values())):
        raise UserError(f"{path} is not {FILE}: it has no domain {', '.join(missing)}; copy it anew")
    return found
