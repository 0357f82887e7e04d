"""Texts as rows of feature numbers: words and the character n-grams in them, hashed; nothing to download and nothing to fit."""

import re
from collections.abc import Callable, Iterable
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from toolkit.data.bank import Tokens
from toolkit.errors import UserError

HASHED = Tokens("words and n-grams, hashed", "hashing words and n-grams")
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def features(text: str, buckets: int = 4096, length: int = 64, shortest: int = 3, longest: int = 3) -> list[int]:
    """The features of a text: `length` numbers in 1..`buckets` - 1, and 0 where the text has fewer.

    First come the words, in lower case, then the n-grams of `shortest` to `longest` characters of each word, taken with its
    boundaries as in "<word>" (Bojanowski et al. 2017, section 3.2, who take 3 to 6). So a word that was never seen shares
    features with words like it, and a text that is too long loses n-grams of its last words first. A feature that occurs
    twice is there twice. The n-gram that is the whole word with its boundaries is left out, being the word.

    The number is 1 + crc32 modulo `buckets` - 1: the same on every machine and in every process. Different features can meet in
    one bucket. An empty text is all 0. Raises UserError for fewer than 2 buckets, a length below 1, n-grams of no characters.
    """
    _check(buckets, length, shortest, longest)
    return _row(text, length, cache(lambda word: _hashed(word, buckets, shortest, longest)))


def rows(texts: Iterable[str], buckets: int = 4096, length: int = 64, shortest: int = 3, longest: int = 3) -> Tensor:
    """`features` of each text, of shape (texts, length) and dtype int64, as embeddings take them."""
    _check(buckets, length, shortest, longest)
    hashed = cache(lambda word: _hashed(word, buckets, shortest, longest))  # a word comes back more often than it is new
    return torch.tensor([_row(text, length, hashed) for text in texts], dtype=torch.int64).view(-1, length)


def _row(text: str, length: int, hashed: Callable[[str], list[int]]) -> list[int]:
    found = [hashed(word) for word in WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))]
    row = [numbers[0] for numbers in found] + [number for numbers in found for number in numbers[1:]]
    return (row + [0] * length)[:length]


def _hashed(word: str, buckets: int, shortest: int, longest: int) -> list[int]:
    """The number of a word, then those of its n-grams."""
    whole = f"<{word}>"
    grams = [whole[i : i + n] for n in range(shortest, longest + 1) for i in range(len(whole) - n + 1) if n < len(whole)]
    return [1 + crc32(part.encode()) % (buckets - 1) for part in (whole, *grams)]


def _check(buckets: int, length: int, shortest: int, longest: int) -> None:
    if buckets < 2 or length < 1 or shortest < 1:
        raise UserError(
            f"{buckets} buckets, rows of length {length}, n-grams of {shortest} characters; give at least 2, 1 and 1 of them"
        )
