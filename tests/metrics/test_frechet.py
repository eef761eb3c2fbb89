import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import distributed, nn

from aligntok.errors import UserError
from aligntok.metrics import GenerationMetrics, InceptionFeatures, Reference, frechet_distance, inception
from tests.ranks import run_ranks


class Pixels(nn.Module):
    """Features that a test can recompute: the image averaged to a 2 x 2 grid, 12 numbers."""

    def __init__(self, name: str = "pixels", num_features: int = 12):
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image):
        assert image.dtype == torch.float32
        assert not torch.is_autocast_enabled(image.device.type)
        assert not torch.is_grad_enabled()
        assert not self.norm.training
        return (self.weight * nn.functional.adaptive_avg_pool2d(image, 2)).flatten(1)


def images(count: int, seed: int, power: float = 1.0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) ** power


def measured(real, fake, batch: int = 16):
    metric = GenerationMetrics(Pixels())
    for kind, values in ((True, real), (False, fake)):
        for part in values.split(batch):
            metric.update(part, real=kind)
    return metric


def distance(metric):
    return metric.compute()["fd_pixels"]


def png_features(image):
    pixels = (image * 255).round().byte().double() / 255
    return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1).numpy()


REAL, FAKE = images(150, 0), images(130, 1, power=1.3)


def random_cov(dim: int, samples: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 1, dim, dtype=torch.float64)
    values = torch.randn(samples, dim, dtype=torch.float64, generator=generator) * scales
    return values.T.cov()


# the distance itself


@pytest.mark.parametrize("samples", [500, 20])  # 20 samples in 64 dimensions: singular, where sqrtm goes astray
def test_distance_to_itself_is_nothing(samples):
    cov = random_cov(64, samples, 0)
    mean = torch.randn(64, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean, cov) <= 1e-12 * cov.trace()
    noise = torch.randn(64, 64, dtype=torch.float64) * 1e-16
    assert frechet_distance(mean, cov, mean, cov + cov * (noise + noise.T)) <= 1e-10 * cov.trace()


def test_closed_form_of_diagonal_covariances():
    a, b = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean1, mean2 = torch.zeros(30).double(), torch.full((30,), 0.5).double()
    expected = 30 * 0.25 + (a.sqrt() - b.sqrt()).square().sum()
    torch.testing.assert_close(frechet_distance(mean1, a.diag(), mean2, b.diag()), expected, rtol=1e-12, atol=0)
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    cov1, cov2 = (rotation @ x.diag() @ rotation.T for x in (a, b))
    torch.testing.assert_close(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9, atol=0)


def test_equals_sqrtm_of_scipy():
    cov1, cov2 = random_cov(40, 300, 0), random_cov(40, 400, 1)
    mean1, mean2 = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real
    assert frechet_distance(mean1, cov1, mean2, cov2).item() == pytest.approx(expected.item(), rel=1e-9)


def test_no_spread_leaves_the_shift():
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    assert frechet_distance(zero, zero.diag(), one, zero.diag()) == 3


# the metric


def test_statistics_are_numpys():
    statistics = measured(REAL, FAKE).reference(source="val")
    features = png_features(REAL)
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.cov, np.cov(features.T), rtol=1e-3, atol=1e-9)
    assert (statistics.count, statistics.source, statistics.features) == (150, "val", "pixels")


def test_value_is_the_distance_of_the_statistics():
    real, fake = png_features(REAL), png_features(FAKE)
    expected = frechet_distance(
        *(torch.tensor(f(x)) for x in (real, fake) for f in (lambda x: x.mean(0), lambda x: np.cov(x.T)))
    )
    assert distance(measured(REAL, FAKE)) == pytest.approx(expected.item(), rel=1e-5)


def test_same_images_are_at_distance_nothing():
    metric = measured(REAL, REAL.flip(0))
    assert distance(metric) <= 1e-9 * metric.reference().cov.trace()


def test_batch_size_does_not_matter():
    small, large = (distance(measured(REAL, FAKE, batch)) for batch in (7, 64))
    assert small == pytest.approx(large, rel=1e-8)


def test_images_are_quantised_as_in_a_png():
    exact = (REAL * 255).round() / 255
    expected = distance(measured(exact, FAKE))
    assert distance(measured(REAL, FAKE)) == expected
    nudge = torch.empty_like(exact).uniform_(-0.4 / 255, 0.4 / 255)
    assert distance(measured((exact + nudge).clamp(0, 1), FAKE)) == expected
    black_and_white = exact.round()
    overshooting = black_and_white * 1.4 - 0.2
    assert distance(measured(exact, overshooting)) == distance(measured(exact, black_and_white))


def test_autocast_and_lower_precision_around_change_nothing():
    exact = (REAL * 255).round() / 255
    expected = distance(measured(exact, FAKE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(measured(exact, FAKE)) == expected
    assert measured(exact, FAKE).sums[0].products.dtype == torch.float64


def test_feature_network_is_frozen_and_belongs_to_no_module():
    metric = measured(REAL, FAKE)
    module = nn.Module()
    module.fid = metric
    assert not module.state_dict()
    assert not list(module.parameters())
    module.train().half()
    assert not metric.features.training
    assert not metric.features.weight.requires_grad
    assert metric.features.weight.dtype == torch.float32


def test_names():
    assert GenerationMetrics(Pixels("inception")).names == ["fid"]
    assert GenerationMetrics(Pixels("efficientnet_lite0")).names == ["fd_efficientnet_lite0"]


def test_images_are_numbered_where_they_have_no_ids():
    metric = measured(REAL, FAKE)
    assert metric.samples.gather(metric.device)[0].tolist() == list(range(130))


# the reference


def test_saved_reference_gives_the_same_value(tmp_path):
    metric = measured(REAL, FAKE)
    path = tmp_path / "new" / "reference.safetensors"
    metric.reference("val50k").save(path)
    metric.reference("val50k").save(path)
    assert [x.name for x in path.parent.iterdir()] == ["reference.safetensors"]
    loaded = Reference.load(path)
    assert (loaded.count, loaded.source, loaded.features) == (150, "val50k", "pixels")
    other = GenerationMetrics(Pixels())
    other.set_reference(loaded)
    other.update(FAKE, real=False)
    assert distance(other) == pytest.approx(distance(metric), rel=1e-9)
    assert other.reference().source == "val50k"


def test_set_reference_replaces_real_images_and_the_cached_value():
    metric = measured(REAL, FAKE)
    before = distance(metric)
    metric.set_reference(measured(FAKE, FAKE).reference())
    assert distance(metric) < 1e-3 * before
    with pytest.raises(UserError, match="a reference was set"):
        metric.update(REAL, real=True)


@pytest.mark.parametrize("given", [True, False])
def test_reset_keeps_the_reference(given):
    metric = measured(REAL, FAKE)
    expected = distance(metric)
    if given:
        metric.set_reference(metric.reference())
    metric.reset()
    metric.update(FAKE, real=False)
    assert distance(metric) == pytest.approx(expected, rel=1e-8)


def test_reference_of_other_features_is_refused():
    statistics = measured(REAL, FAKE).reference()
    metric = GenerationMetrics(Pixels())
    with pytest.raises(UserError, match="'dino'"):
        metric.set_reference(replace(statistics, features="dino"))
    with pytest.raises(UserError, match="5 dimensions"):
        metric.set_reference(replace(statistics, mean=torch.zeros(5), cov=torch.eye(5)))
    with pytest.raises(UserError, match="1 image"):
        metric.set_reference(replace(statistics, count=1))


def test_bad_statistics_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="not found"):
        Reference.load(path)
    path.write_bytes(b"this is no tensor file at all")
    with pytest.raises(UserError, match="not a safetensors file"):
        Reference.load(path)
    metadata = {"count": "9", "source": "", "features": "pixels"}
    save_file({"mean": torch.zeros(3)}, path, metadata)
    with pytest.raises(UserError, match="lacks cov"):
        Reference.load(path)
    save_file({"mean": torch.zeros(3), "cov": torch.eye(3)}, path)
    with pytest.raises(UserError, match="lacks count, source, features"):
        Reference.load(path)
    save_file({"mean": torch.zeros(3), "cov": torch.eye(4)}, path, metadata)
    with pytest.raises(UserError, match=r"x\.safetensors.*\(4, 4\)"):
        Reference.load(path)


# mistakes


@pytest.mark.parametrize(
    ("image", "real", "message"),
    [
        ((REAL * 255).byte(), True, "uint8"),
        (REAL * 255, True, r"\[0, 1\]"),
        (REAL * 255, False, r"\[0, 1\]"),
        (REAL * 2 - 1, True, r"\[0, 1\]"),
        (REAL * float("nan"), False, "NaN"),
        (REAL[:, :1], True, r"\(B, 3, H, W\)"),
    ],
)
def test_wrong_images_are_refused(image, real, message):
    metric = GenerationMetrics(Pixels())
    with pytest.raises(UserError, match=message):
        metric.update(image, real=real)
    assert all(not sums.products.any() for sums in metric.sums + metric.real_sums)


def test_one_wild_pixel_of_a_decoder_is_no_mistake():
    wild = FAKE.clone()
    wild[0, 0, 0, 0] = 40
    assert np.isfinite(distance(measured(REAL, wild)))


def test_too_few_images():
    with pytest.raises(UserError, match="generated images or more, got 1"):
        distance(measured(REAL, FAKE[:1]))
    with pytest.raises(UserError, match="real images or more, got 1"):
        measured(REAL[:1], FAKE).reference()


def test_wrong_feature_networks():
    with pytest.raises(UserError, match="num_features"):
        GenerationMetrics(nn.Identity())
    with pytest.raises(UserError, match="expected \\(150, 7\\)"):
        GenerationMetrics(Pixels(num_features=7)).update(REAL, real=True)


# ranks


def compute_on_rank():
    """Two ranks share the images unevenly; the last one sees no real image at all."""
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank)
    metric = measured(REAL if rank == 0 else REAL[:0], FAKE[:90] if rank == 0 else FAKE[90:])
    value = distance(metric)
    statistics = metric.reference()
    local_counts = [int(sums[0].products[0, 0]) for sums in (metric.real_sums, metric.sums)]
    other = GenerationMetrics(Pixels())
    other.set_reference(statistics)
    other.update(FAKE[rank::2], real=False)
    return value, distance(other), statistics.count, local_counts


def test_two_processes_equal_one():
    expected = distance(measured(REAL, FAKE))
    first, second = run_ranks(2, compute_on_rank)
    for value, with_reference, count, _ in (first, second):
        assert value == pytest.approx(expected, rel=1e-8)
        assert with_reference == pytest.approx(expected, rel=1e-8)
        assert count == 150
    assert first[:3] == second[:3]
    assert [x[3] for x in (first, second)] == [[150, 90], [0, 40]]  # local again after compute


# Inception


def test_inception_looks_for_its_weights_late_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(inception.torch.hub, "download_url_to_file", offline)
    metric = GenerationMetrics(InceptionFeatures())
    assert metric.names == ["fid"]
    with pytest.raises(
        UserError, match=r"weights-inception-2015-12-05-6726825d\.pth.*no route to host.*ALIGNTOK_HOME.*hub"
    ):
        metric.update(REAL, real=True)
    with pytest.raises(UserError, match=r"absent\.pth; it should be"):
        InceptionFeatures(weights=str(tmp_path / "absent.pth"))(REAL)
    (tmp_path / "home" / InceptionFeatures.FILE).write_bytes(b"no pickle")
    with pytest.raises(UserError, match="does not hold the Inception weights"):
        metric.update(REAL, real=True)


def test_inception_runs_with_weights_from_home(tmp_path, monkeypatch):
    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **kwargs):
            return super().load_state_dict(self.state_dict() | state_dict)

    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "FeatureExtractorInceptionV3", Untrained)
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / InceptionFeatures.FILE)
    features = InceptionFeatures()
    assert features(REAL[:2]).shape == (2, 2048)
    assert not features.state_dict()
