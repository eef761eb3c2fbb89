"""What images are compared with: statistics and features of a reference set, and the files that hold them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_file, write_atomically

TENSORS = ("mean", "cov", "spatial_mean", "spatial_cov", "sample")  # of a Reference and its file


@dataclass(eq=False)
class Reference:
    """Mean and covariance of the features of a set of images, and what other measures than the FID need beside.

    >>> reference = Reference(torch.zeros(2), torch.eye(2), count=100, source="toy", features="pixels")
    >>> path = getfixture("tmp_path") / "toy.safetensors"
    >>> reference.save(path)
    >>> Reference.load(path).mean
    tensor([0., 0.], dtype=torch.float64)

    Attributes:
        mean: (D,) float64.
        cov: (D, D) float64, with the divisor ``count - 1`` like ``numpy.cov``.
        count: Number of images measured; 0 where a file of others does not tell.
        source: Id of the images (name of a file with its hash, hash of the image list and crop); "" if unknown.
        features: ``name`` of the feature network.
        spatial_mean: Mean (S,) of the features of sFID.
        spatial_cov: Their covariance (S, S).
        sample: Features of some of the images, (M, D) float32, for precision, recall, KID and MIND.
        image_size: Height and width of the images in pixels.

    Raises:
        UserError: The shapes do not fit together.
    """

    mean: Tensor
    cov: Tensor
    count: int
    source: str
    features: str
    spatial_mean: Tensor | None = None
    spatial_cov: Tensor | None = None
    sample: Tensor | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                dtype = torch.float32 if name == "sample" else torch.float64
                setattr(self, name, value.detach().to("cpu", dtype).contiguous())
        for mean, cov in self.moments:
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            check(mean.dim() == 1 and cov.shape == 2 * mean.shape, f"a mean (D,) goes with (D, D), not {shapes}")
        if self.sample is not None:
            width = f"features (M, {len(self.mean)}) go with this mean, not {tuple(self.sample.shape)}"
            check(self.sample.dim() == 2 and self.sample.shape[1] == len(self.mean), width)
        for name in TENSORS:
            value = getattr(self, name)
            check(value is None or bool(value.isfinite().all()), f"{name} contains NaN or infinity: measure it anew")

    @property
    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of the features, and of those of sFID if they are there."""
        pairs = ((self.mean, self.cov), (self.spatial_mean, self.spatial_cov))
        return [(mean, cov) for mean, cov in pairs if mean is not None and cov is not None]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a reader sees the old file or the whole new one, never a part."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        metadata = {"count": str(self.count), "source": self.source, "features": self.features}
        if self.image_size is not None:
            metadata["image_size"] = "x".join(map(str, self.image_size))
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read what ``save`` wrote.

        Raises:
            UserError: No such file, not a safetensors file, an entry missing, or shapes that do not fit.
        """
        check(Path(path).is_file(), f"reference statistics not found: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in set(TENSORS).intersection(file.keys())}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a safetensors file ({words_of(error)})") from error
        missing = [key for key in ("mean", "cov", "count", "source", "features") if key not in tensors | metadata]
        check(not missing, f"{path} lacks {', '.join(missing)}: give a file that `Reference.save` wrote")
        texts = {key: metadata[key] for key in ("source", "features")}
        try:
            height, _, width = metadata.get("image_size", "").partition("x")
            size = (int(height), int(width)) if width else None
            return cls(**tensors, **texts, count=int(metadata["count"]), image_size=size)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error


class AdmFile:
    """An ``.npz`` file as ADM's evaluator reads it: images, and perhaps Inception statistics of a larger set.

    Entries: ``arr_0``, uint8 (N, H, W, 3); ``mu`` and ``sigma`` of ``pool_3``, ``mu_s`` and ``sigma_s`` of the features
    of sFID. ADM's ``VIRTUAL_imagenet256_labeled.npz`` has the statistics of all training images, without their number,
    and 10,000 of these images. Files of samples have ``arr_0`` only.

    >>> path = getfixture("tmp_path") / "samples.npz"
    >>> np.savez(path, arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    >>> [tuple(image.shape) for image in AdmFile(path).images(batch_size=4)]
    [(4, 3, 16, 16), (1, 3, 16, 16)]

    Raises:
        UserError: No such file, no ``.npz``, or ``arr_0`` is something else than images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check(self.path.is_file(), f"reference not found: {self.path}")
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                self.entries = set(file.files)
            self.shape: tuple[int, ...] = (0, 0, 0, 3)
            if "arr_0" in self.entries:
                stream, self.shape = self._open()
                stream.close()
        except Exception as error:  # NumPy and zipfile raise many kinds on what is damaged
            raise UserError(
                f"{self.path} is no .npz of images and statistics as ADM's are ({words_of(error)})"
            ) from error

    @property
    def source(self) -> str:
        """Name of the file and 16 digits of its SHA-256."""
        return f"{self.path.name} sha256:{hash_file(self.path)[:16]}"

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images, if there are any."""
        return (self.shape[1], self.shape[2]) if self.shape[0] else None

    def statistics(self, suffix: str = "") -> tuple[Tensor, Tensor]:
        """Return ``mu`` and ``sigma``, or those with a suffix; raise a ``UserError`` if they are not there."""
        names = [f"mu{suffix}", f"sigma{suffix}"]
        found = ", ".join(sorted(self.entries))
        check(self.entries.issuperset(names), f"{self.path} has no {' and '.join(names)} (only {found})")
        mean, cov = self.array(names[0]), self.array(names[1])
        problem = f"{self.path}: {' and '.join(names)} are {mean.dtype} {mean.shape} and {cov.dtype} {cov.shape}"
        real = all(np.issubdtype(value.dtype, np.floating) for value in (mean, cov))
        check(real, f"{problem}, not floating point numbers")
        return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(cov.astype(np.float64))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Read an entry; raise a ``UserError`` if it is damaged. Pickled objects are refused, nothing in it is run."""
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return np.asarray(file[name])
        except Exception as error:
            raise UserError(f"{self.path} is damaged at {name} ({words_of(error)}): copy it again") from error

    def images(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the images in order, float32 (batch_size, 3, H, W) in [0, 1].

        Raises:
            UserError: There are none, or the file is truncated or altered.
        """
        found = ", ".join(sorted(self.entries))
        check(self.image_size is not None, f"{self.path} has no images `arr_0` (only {found})")
        count, *rest = self.shape
        file, _ = self._open()
        with file:
            for start in range(0, count, batch_size):
                shape = (min(batch_size, count - start), *rest)
                try:
                    data = bytearray(file.read(math.prod(shape)))
                    image = torch.frombuffer(data, dtype=torch.uint8).view(shape)
                except Exception as error:
                    raise UserError(
                        f"{self.path} is damaged at image {start} ({words_of(error)}): copy it again"
                    ) from error
                yield image.permute(0, 3, 1, 2).contiguous().float() / 255

    def _open(self) -> tuple[Any, tuple[int, ...]]:
        """Return ``arr_0`` as a stream at its first byte, and its shape."""
        archive = zipfile.ZipFile(self.path)
        file, size = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size  # the caller closes it
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3) in C order")
        if file.tell() + math.prod(shape) != size or math.prod(shape[1:]) == 0:
            raise ValueError(f"arr_0 of {shape} has {size:,} bytes")
        return file, shape
