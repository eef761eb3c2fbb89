"""What images are compared with: statistics and features of a reference set, and the files that hold them."""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligntok.errors import UserError
from aligntok.files import hash_file, write_atomically


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images: all that a Fréchet distance needs to know of it.

    >>> statistics = FeatureStatistics(torch.zeros(2), torch.eye(2), count=100, source="toy", features="pixels")
    >>> statistics.mean.dtype
    torch.float64

    Attributes:
        mean: (D,) float64.
        cov: (D, D) float64, with the divisor ``count - 1`` like ``numpy.cov``.
        count: Number of images measured; 0 where a file of others does not tell.
        source: Id of what was measured (hash of the image list and transform, say); "" when nobody said.
        features: Id of the feature network, its ``name``.

    Raises:
        UserError: The shapes do not fit together.
    """

    mean: Tensor
    cov: Tensor
    count: int
    source: str
    features: str

    def __post_init__(self) -> None:
        if self.mean.dim() != 1 or self.cov.shape != (len(self.mean), len(self.mean)):
            raise UserError(
                f"feature statistics need a mean of shape (D,) and a covariance of shape (D, D), got "
                f"{tuple(self.mean.shape)} and {tuple(self.cov.shape)}: measure them again with `reference()`"
            )
        object.__setattr__(self, "mean", self.mean.detach().to("cpu", torch.float64))
        object.__setattr__(self, "cov", self.cov.detach().to("cpu", torch.float64))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a reader sees the old file or the whole new one, never a part."""
        tensors, metadata = self._contents()
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata), shared=True)

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata of the file."""
        tensors = {"mean": self.mean.contiguous(), "cov": self.cov.contiguous()}
        return tensors, {"count": str(self.count), "source": self.source, "features": self.features}

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read what ``save`` wrote.

        Raises:
            UserError: No such file, not a safetensors file, an entry missing, or shapes that do not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"reference statistics not found: {path} (write them with `FeatureStatistics.save`)")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a safetensors file ({error}): give a file that `FeatureStatistics.save` wrote"
            ) from error
        missing = [key for key in ("mean", "cov") if key not in tensors]
        missing += [key for key in ("count", "source", "features") if key not in metadata]
        if missing or not metadata["count"].isdecimal():
            problem = f"lacks {', '.join(missing)}" if missing else f"has count {metadata['count']!r}"
            raise UserError(f"{path} {problem}: give a file that `FeatureStatistics.save` wrote")
        mean, cov, count = tensors["mean"], tensors["cov"], int(metadata["count"])
        try:
            return cls(mean, cov, count, source=metadata["source"], features=metadata["features"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True, eq=False)
class Reference(FeatureStatistics):
    """Feature statistics with what other measures than the Fréchet distance need beside.

    A file of either class is read by both.

    >>> reference = Reference(torch.zeros(2), torch.eye(2), 100, "toy", "pixels", image_size=(32, 32))
    >>> reference.count, reference.image_size
    (100, (32, 32))

    Attributes:
        spatial: Statistics of the features of sFID.
        sample: Features of a part of the images, (M, D) float32, for precision, recall and KID.
        image_size: Height and width of the images in pixels.
    """

    spatial: FeatureStatistics | None = None
    sample: Tensor | None = None
    image_size: tuple[int, int] | None = None

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Add the optional parts that are there."""
        tensors, metadata = super()._contents()
        if self.spatial is not None:
            tensors |= {"spatial_mean": self.spatial.mean.contiguous(), "spatial_cov": self.spatial.cov.contiguous()}
            metadata["spatial_features"] = self.spatial.features
        if self.sample is not None:
            tensors["sample"] = self.sample.float().cpu().contiguous()
        if self.image_size is not None:
            metadata["image_size"] = "x".join(map(str, self.image_size))
        return tensors, metadata

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what ``save`` of either class wrote.

        Raises:
            UserError: As in ``FeatureStatistics.load``.
        """
        base = FeatureStatistics.load(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            more = {key: file.get_tensor(key) for key in file.keys() if key not in ("mean", "cov")}  # noqa: SIM118
        spatial = None
        if "spatial_mean" in more:
            spatial = FeatureStatistics(
                more["spatial_mean"], more["spatial_cov"], base.count, base.source, metadata["spatial_features"]
            )
        height, _, width = metadata.get("image_size", "").partition("x")
        size = (int(height), int(width)) if width else None
        return cls(
            base.mean, base.cov, base.count, base.source, base.features, spatial, more.get("sample"), image_size=size
        )


class AdmFile:
    """An ``.npz`` file as ADM's evaluator reads it: images, and perhaps Inception statistics of a larger set.

    Entries: ``arr_0``, uint8 (N, H, W, 3); ``mu`` and ``sigma`` of ``pool_3``, ``mu_s`` and ``sigma_s`` of the features
    of sFID. ADM's ``VIRTUAL_imagenet256_labeled.npz`` has all, the statistics of all training images (how many, it does
    not say) and 10,000 of these images. Files of samples have ``arr_0`` only. Images are read in batches.

    >>> path = getfixture("tmp_path") / "samples.npz"
    >>> np.savez(path, arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    >>> [tuple(image.shape) for image in AdmFile(path).images(batch_size=4)]
    [(4, 3, 16, 16), (1, 3, 16, 16)]

    Args:
        path: The file.

    Raises:
        UserError: No such file, no ``.npz``, or ``arr_0`` is something else than images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"reference not found: {self.path}")
        try:
            with np.load(self.path, allow_pickle=False) as file:
                self.entries = set(file.files)
            self.shape: tuple[int, ...] = (0, 0, 0, 3)
            if "arr_0" in self.entries:
                stream, self.shape = self._open()
                stream.close()
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is no .npz of images and statistics as ADM's are ({error})") from error

    @property
    def source(self) -> str:
        """Name of the file and 16 digits of its SHA-256."""
        return f"{self.path.name} sha256:{hash_file(self.path)[:16]}"

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images, if there are any."""
        return (self.shape[1], self.shape[2]) if self.shape[0] else None

    def statistics(self, features: str, suffix: str = "", source: str = "") -> FeatureStatistics:
        """Return ``mu`` and ``sigma`` with the suffix, under the name of the features that they are of.

        Raises:
            UserError: They are not there.
        """
        names = [f"mu{suffix}", f"sigma{suffix}"]
        if not self.entries.issuperset(names):
            raise UserError(f"{self.path} has no {' and '.join(names)} (only {', '.join(sorted(self.entries))})")
        with np.load(self.path, allow_pickle=False) as file:
            mean, cov = (torch.from_numpy(file[name]) for name in names)
        return FeatureStatistics(mean, cov, count=0, source=source, features=features)

    def images(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the images in order, float32 (batch_size, 3, H, W) in [0, 1].

        Raises:
            UserError: There are none, or the file is truncated or altered.
        """
        if not self.image_size:
            raise UserError(f"{self.path} has no images `arr_0` (only {', '.join(sorted(self.entries))})")
        count, *rest = self.shape
        file, _ = self._open()
        with file:
            for start in range(0, count, batch_size):
                shape = (min(batch_size, count - start), *rest)
                try:
                    data = bytearray(file.read(int(np.prod(shape))))
                    image = torch.frombuffer(data, dtype=torch.uint8).view(shape)
                except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise UserError(f"{self.path} is damaged at image {start} ({error}): copy it again") from error
                yield image.permute(0, 3, 1, 2).contiguous().float() / 255

    def _open(self) -> tuple[Any, tuple[int, ...]]:
        """Return ``arr_0`` as a stream at its first byte, and its shape."""
        file = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  the caller closes it
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3) in C order")
        return file, shape
