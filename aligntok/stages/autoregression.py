"""The autoregressive generator: a decoder-only transformer on a tokenizer's tokens, trained to name the next one.

Reference:
    Wu et al., AliTok, arXiv:2506.05289, section 4; after Sun et al., LlamaGen, arXiv:2406.06525.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aligntok.decoding import TokenSampler, release
from aligntok.errors import UserError, check
from aligntok.files import write_text
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasCache
from aligntok.stages.generator import GeneratorStage, check_below
from aligntok.stages.optimization import Optimization

PER_POSITION = "accuracy_per_position.csv"
SIZES = ("codebook_size", "grid", "num_prefix", "sequence_length")  # that tokenizer, cache and network share
NUM_BEST = 5  # of the second accuracy


class AutoregressiveGeneration(GeneratorStage):
    """Trains a network to predict each token from the class and the tokens before it, and samples with it.

    Batches hold ``tokens`` (B, N) int64 from the cache, or ``image`` (B, 3, H, W), which the tokenizer encodes;
    ``label`` (B,); and ``id`` (B,). The loss is the cross-entropy, in nats, over all positions alike. Validation
    measures it on all images, with the share of tokens that are the likeliest one (``val/accuracy``) and among the five
    likeliest, and writes both per position to ``accuracy_per_position.csv``.

    Args:
        network: Tokens and label to logits.
        tokenizer: Decodes samples, and encodes images where nothing is cached; from a checkpoint:
            ``class_path: aligntok.weights.load_tokenizer``. Null trains on a cache that has none here.
        label_dropout: Share of labels that become the null class, in [0, 1], for classifier-free guidance.
        sampler: From class to tokens.
        seed: Of the samples; a sample is a function of (seed, id, label).
        optimization: Optimizer, learning rate, weight decay.

    >>> network = AutoregressiveTransformer(8, (2, 2), 1, num_classes=3, width=16, depth=1, num_heads=2)
    >>> stage = AutoregressiveGeneration(network, sampler=TokenSampler(guidance_scale=2.0))
    >>> stage.sample(ids=torch.arange(2), label=torch.tensor([0, 2])).shape
    torch.Size([2, 5])

    Raises:
        UserError: Network, tokenizer and sampler that do not fit each other; both values are named.
    """

    code = "tokens"

    def __init__(
        self,
        network: AutoregressiveTransformer,
        tokenizer: Tokenizer | None = None,
        label_dropout: float = 0.1,
        sampler: TokenSampler | None = None,
        seed: int = 0,
        optimization: Optimization = Optimization(4e-4),
    ) -> None:
        super().__init__(network, tokenizer, label_dropout, seed, optimization)
        self.sampler = sampler or TokenSampler()
        self.check_parts()

    def check_parts(self) -> None:
        """Raise a ``UserError`` where the parts do not fit each other: now, not at the first samples."""
        super().check_parts()
        try:
            self.sampler.check(self.network)
        except UserError as error:
            raise UserError(f"sampler: {error}") from error
        if self.tokenizer is None:
            return
        spec = self.tokenizer.spec
        needed = "an autoregressive generator needs a discrete one"
        check(spec.kind == "discrete", f"tokenizer is {spec.kind}, but {needed}")
        for name in SIZES:
            ours, theirs = getattr(self.network, name), getattr(spec, name)
            text = f"network.{name} {ours} differs from the {name} of tokenizer {theirs}: set the first to the second"
            check(ours == theirs, text)

    def check_data(self, data: HasCache) -> None:
        """Refuse tokens of another tokenizer, codebook, grid or prefix."""
        data.check_tokens({name: getattr(self.network, name) for name in SIZES}, self.tokenizer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels and tokens that the network does not have while they are on the CPU."""
        if "tokens" in batch:
            check_below(self.network.codebook_size, batch["tokens"], "token", "network.codebook_size")
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of one batch."""
        release(self.network)  # what drawing samples has kept is room for this step
        tokens = self.code_of(batch)  # (B, N)
        logits = self.logits(tokens, self.drop(batch))  # (B, N, codebook_size)
        loss = cross_entropy(logits.flatten(0, 1), tokens.flatten())
        accuracy = (logits.detach().argmax(-1) == tokens).float().mean()
        self.log_terms({"loss": loss.detach(), "accuracy": accuracy}, len(tokens))
        return loss

    def logits(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Return the logits (B, N, codebook_size) of each token, given those before it, in fp32."""
        logits: Tensor = self.network(tokens[:, :-1], None if self.network.num_classes is None else label)
        return logits.float()

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the sums per position."""
        tokens = self.code_of(batch)  # (B, N)
        logits = self.logits(tokens, batch["label"])  # (B, N, codebook_size)
        likeliest = logits.topk(min(NUM_BEST, logits.shape[2])).indices  # in order; ties are broken, not counted twice
        found = likeliest == tokens[..., None]
        loss = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        terms = (loss, found[..., 0], found.any(-1), torch.ones_like(tokens))
        sums = torch.stack([term.float().sum(0) for term in terms])  # (4, N)
        self.sums["positions"] = self.sums["positions"] + sums if "positions" in self.sums else sums
        return {"tokens": tokens}

    def log_sums(self, split: str) -> None:
        """Log the means over all images of all ranks; those of validation are also written per position."""
        sums = self.total("positions")
        if sums is None:
            return
        loss, accuracy, best = means = sums[:3] / sums[3]
        prefix = self.network.num_prefix
        values = {"loss": loss, "accuracy": accuracy, f"accuracy_top{NUM_BEST}": best}
        values |= {"accuracy_grid": accuracy[prefix:]} | ({"accuracy_prefix": accuracy[:prefix]} if prefix else {})
        logged = {f"{split}/{name}": value.mean() for name, value in values.items()}
        self.log_dict(logged, sync_dist=True)  # the mean of equal values: without it, Lightning warns
        if split == "val" and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self.write_positions(means)

    def write_positions(self, means: Tensor) -> None:
        """Write loss and accuracies (3, N) as a table with a line for each position; the prefix comes first."""
        lines = [f"position,part,loss,accuracy,accuracy_top{NUM_BEST}"]
        for position, values in enumerate(means.T.tolist()):
            part = "prefix" if position < self.network.num_prefix else "grid"
            lines.append(f"{position},{part}," + ",".join(f"{value:.6f}" for value in values))
        write_text(Path(self.trainer.default_root_dir) / PER_POSITION, "\n".join(lines) + "\n")

    @torch.no_grad()
    def sample(self, ids: Tensor, label: Tensor, sampler: TokenSampler | None = None) -> Tensor:
        """Return tokens (B, N): each row a function of its id (B,), its label (B,) and the seed alone."""
        chosen = None if self.network.num_classes is None else label
        self.network.check_condition(chosen)
        chosen = None if chosen is None else chosen.to(self.device)
        return (sampler or self.sampler)(self.network, chosen, ids.to(self.device), self.seed)
