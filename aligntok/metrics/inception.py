"""The Inception network of 2015: the features of FID, of sFID, and the logits of the Inception Score, in one pass.

Reference:
    Heusel et al., arXiv:1706.08500 (FID); Nash et al., arXiv:2103.03841 (sFID); Salimans et al., arXiv:1606.03498 (IS);
    the choices of layers and channels are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py).
"""

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from aligntok.errors import UserError
from aligntok.networks.frozen import Frozen
from aligntok.published import published_file

SPATIAL_CHANNELS, SPATIAL_GRID = 7, 17  # of ADM's evaluator: the first 7 channels of a map of 17 x 17


class InceptionFeatures(nn.Module):
    """Pool-3 features of the Inception network of 2015 that every published FID uses.

    torch-fidelity's port, with the weights and the resize to 299 of TensorFlow 1 (bilinear, no half-pixel centres, no
    antialias): numbers compare with those of torch-fidelity and of ADM's evaluator.

    The weights are read from ``weights``, else as in ``aligntok.published``, by ``load_frozen`` or at the first use.
    They belong to no ``state_dict``.

    >>> features = InceptionFeatures()  # needs no file yet
    >>> features.name, features.num_features
    ('inception', 2048)

    Args:
        weights: Path of ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
        UserError: When they are needed: they are nowhere and cannot be downloaded, or the file holds something else.
    """

    FILE: str = URL_INCEPTION_V3.rsplit("/", 1)[-1]

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.name = "inception"
        self.num_features = 2048
        self.num_spatial = SPATIAL_CHANNELS * SPATIAL_GRID**2
        self.weights = weights
        self.network = Frozen(self._build)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, 2048) of images (B, 3, H, W) in [0, 1], which are rounded to 8 bits."""
        pixels = image.float().clamp(0, 1).mul(255).round().byte()
        return self.network.on(image.device)(pixels)[0]  # type: ignore[no-any-return]

    def with_spatial(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 2048) and, of the same pass, those of sFID (B, 2023) of images (B, 3, H, W).

        The latter are ADM's ``mixed_6/conv:0``: the first branch of ``Mixed_6d`` after its ReLU, 7 channels of 17 x 17
        in the order (row, column, channel) of ``mu_s`` and ``sigma_s`` in ADM's reference file.
        """
        maps: list[Tensor] = []
        branch = self.network.on(image.device).get_submodule("Mixed_6d.branch1x1")
        hook = branch.register_forward_hook(lambda module, inputs, output: maps.append(output[:, :SPATIAL_CHANNELS]))
        with hook:
            features = self(image)
        return features, maps[0].permute(0, 2, 3, 1).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, 1008), float64, of features (B, 2048), without the bias, as in published scores."""
        weight: Tensor = self.network.on(features.device).get_parameter("fc.weight")
        return features.double() @ weight.double().T

    def _build(self) -> nn.Module:
        """Return the network with its weights."""
        remedy = ", give its path as `weights`, or choose other features"
        path = published_file(URL_INCEPTION_V3, "FID", remedy, self.weights)
        try:
            # torch-fidelity unpickles without restriction: a file that passes here has nothing to run there.
            torch.load(path, map_location="cpu", weights_only=True)
            network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        except Exception as error:  # whatever unpickling or strict loading makes of a wrong file
            found = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"{path} does not hold the Inception weights ({found}): put {self.FILE} there") from error
        return network
