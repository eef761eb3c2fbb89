"""All measures in one pass, over a feature network whose output numpy can recompute."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn

from aligntok.errors import UserError
from aligntok.metrics import (
    GenerationMetrics,
    Protocol,
    Reference,
    find_protocol,
    frechet_distance,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from aligntok.metrics.collected import Collected
from aligntok.metrics.reference import TENSORS
from tests.ranks import run_ranks

ALL = {"sfid": True, "inception_score": True, "precision_recall": True, "kid": True, "mind": True}


class Pixels(nn.Module):
    """Averages on a grid of 2 x 2 as features, those of the whole image as the spatial ones; called Inception."""

    def __init__(self, name: str = "inception"):
        super().__init__()
        self.name = name
        self.num_features, self.num_spatial = 12, 3
        self.passes = 0

    def forward(self, image):
        return self.with_spatial(image)[0]

    def with_spatial(self, image):
        self.passes += len(image)
        assert not torch.is_grad_enabled()
        return nn.functional.adaptive_avg_pool2d(image, 2).flatten(1), image.mean((2, 3))

    def logits(self, features):
        return features.double() * 10


class Plain(nn.Module):
    """The same features of a network that is no Inception."""

    name, num_features = "plain", 12

    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)


def images(count: int, seed: int, power: float = 1.0):
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) ** power
    return (noise * 255).round() / 255


REAL, FAKE = images(150, 0), images(130, 1, power=1.1)
IDS = torch.randperm(130, generator=torch.Generator().manual_seed(2))  # samples come in any order


def feed(metrics, image, ids, batch=16, **options):
    for part, id in zip(image.split(batch), ids.split(batch), strict=True):
        metrics.update(part, id, **options)
    return metrics


def measured(batch: int = 16, **options):
    metrics = feed(GenerationMetrics(Pixels(), **{**ALL, **options}), REAL, torch.arange(150), batch, real=True)
    return feed(metrics, FAKE, IDS, batch)


def numpy_fid(a, b):
    return frechet_distance(*(torch.tensor(x) for y in (a, b) for x in (y.mean(0), np.cov(y.T)))).item()


def test_every_measure_is_numpys():
    metrics = measured()
    values = metrics.compute()
    real, fake = (Plain()(x).double().numpy() for x in (REAL, FAKE))
    by_id = torch.from_numpy(fake)[IDS.argsort()]
    precision, recall = precision_recall(*map(torch.from_numpy, (real, fake)))
    assert 0 < recall < 1
    expected = {
        "fid": numpy_fid(real, fake),
        "sfid": numpy_fid(*(x.mean((2, 3)).double().numpy() for x in (REAL, FAKE))),
        "is": inception_score(by_id * 10),
        "precision": precision,
        "recall": recall,
        "kid": kernel_distance(*map(torch.from_numpy, (real, fake))),
        "mind": monge_distance(torch.from_numpy(real), by_id),
    }
    assert values == pytest.approx(expected, rel=1e-4)
    assert values["is"] != pytest.approx(inception_score(torch.from_numpy(fake) * 10), rel=1e-4)  # the order counts
    assert metrics.features.passes == 280  # one pass per image


def test_fid_alone_keeps_no_features():
    metrics = measured(**dict.fromkeys(ALL, False))
    assert metrics.compute() == {"fid": pytest.approx(measured().compute()["fid"], rel=1e-6)}
    assert not any(features.numel() for _, features in metrics.samples.parts)


@pytest.mark.parametrize("batch", [7, 64])
def test_batch_size_does_not_matter(batch):
    assert measured(batch).compute() == pytest.approx(measured().compute(), rel=1e-6)


def test_same_images_are_at_distance_nothing():
    metrics = feed(GenerationMetrics(Pixels(), sfid=True, kid=True), REAL, torch.arange(150), real=True)
    values = feed(metrics, REAL.flip(0), torch.arange(150)).compute()
    assert values["fid"] < 1e-9
    assert values["sfid"] < 1e-9
    assert values["kid"] <= 0  # unbiased: below 0 where the sets are nearer than two draws


def test_other_features_have_other_names():
    metrics = GenerationMetrics(Plain(), precision_recall=True, kid=True)
    feed(feed(metrics, REAL, torch.arange(150), real=True), FAKE, IDS)
    assert set(metrics.compute()) == {"fd_plain", "precision_plain", "recall_plain", "kid_plain"}
    for option in ("sfid", "inception_score"):
        with pytest.raises(UserError, match="not of plain"):
            GenerationMetrics(Plain(), **{option: True})


def test_an_image_counts_once():
    metrics = measured()
    metrics.update(FAKE[:1], IDS[:1])
    with pytest.raises(UserError, match=f"image {IDS[0]} was measured twice"):
        metrics.compute()
    metrics.reset()
    assert feed(metrics, FAKE, IDS).compute() == pytest.approx(measured().compute(), rel=1e-6)


def test_reference_sample_is_the_same_in_any_order():
    ids, features = torch.arange(5000), torch.arange(5000.0).unsqueeze(1)
    samples = []
    for order, batch in ((torch.arange(5000), 64), (torch.randperm(5000), 7)):
        collected = Collected(1, limit=500)
        for part in order.split(batch):
            collected.add(ids[part], None, features[part])
            assert sum(len(keys) for keys, _ in collected.parts) <= 1000 + batch
        kept, labels, rows = collected.gather(torch.device("cpu"))
        assert (labels == -1).all()
        assert torch.equal(kept, rows.squeeze(1).long())
        samples.append(kept)
    assert torch.equal(*samples)
    counts = torch.histc(samples[0].float(), bins=5, min=0, max=5000)  # 100 of each thousand, and some chance
    assert len(samples[0]) == 500
    assert (counts - 100).abs().max() < 40


# references


def test_saved_reference_gives_the_same_values(tmp_path):
    expected = measured()
    path = tmp_path / "reference.safetensors"
    expected.reference("val").save(path)
    metrics = GenerationMetrics(Pixels(), **ALL)
    metrics.load_reference(path)
    assert feed(metrics, FAKE, IDS).compute() == pytest.approx(expected.compute(), rel=1e-6)
    metrics.reset()
    assert feed(metrics, FAKE, IDS).compute() == pytest.approx(expected.compute(), rel=1e-6)
    assert (metrics.given.image_size, metrics.given.count, metrics.given.source) == ((8, 8), 150, "val")
    plain = Reference(metrics.given.mean, metrics.given.cov, 150, "val", "inception")
    plain.save(path)
    loaded = Reference.load(path)
    assert (loaded.spatial_mean, loaded.spatial_cov, loaded.sample, loaded.image_size) == (None, None, None, None)


def test_files_of_earlier_versions_are_read(tmp_path):
    expected, path = measured().reference("val"), tmp_path / "reference.safetensors"
    tensors = {name: getattr(expected, name) for name in TENSORS}
    numbers = {"count": "150", "source": "val", "features": "inception"}
    save_file(tensors, path, {**numbers, "spatial_features": "inception_spatial", "image_size": "8x8"})
    metrics = GenerationMetrics(Pixels(), **ALL)
    metrics.load_reference(path)
    assert feed(metrics, FAKE, IDS).compute() == measured().compute()


def write_npz(path, image=REAL, **entries):
    np.savez_compressed(path, arr_0=(image * 255).byte().permute(0, 2, 3, 1).numpy(), **entries)
    return path


def statistics_of(image):
    pool, spatial = Plain()(image).double().numpy(), image.mean((2, 3)).double().numpy()
    return {"mu": pool.mean(0), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}


def test_reference_file_of_adm(tmp_path):
    """Statistics of a large set and some of its images."""
    path = write_npz(tmp_path / "VIRTUAL_test.npz", REAL[:100], **statistics_of(REAL))
    metrics = GenerationMetrics(Pixels(), **ALL)
    metrics.load_reference(path, batch_size=7)
    values = feed(metrics, FAKE, IDS).compute()
    expected = measured().compute()
    assert [values[x] for x in ("fid", "sfid", "is")] == pytest.approx([expected[x] for x in ("fid", "sfid", "is")])
    shares = precision_recall(Plain()(REAL[:100]), Plain()(FAKE))
    assert (values["precision"], values["recall"]) == pytest.approx(shares)
    assert metrics.given.source.startswith("VIRTUAL_test.npz sha256:")
    assert "number of images not in the file" in metrics.conditions
    assert metrics.given.image_size == (8, 8)


def test_file_of_images_only(tmp_path):
    path = write_npz(tmp_path / "samples.npz")
    metrics = GenerationMetrics(Pixels(), **ALL)
    metrics.load_reference(path)
    assert feed(metrics, FAKE, IDS).compute() == pytest.approx(measured().compute(), rel=1e-6)
    assert metrics.given.count == 150
    metrics = GenerationMetrics(Plain())  # stored statistics are Inception's: of others, the images count
    metrics.load_reference(write_npz(tmp_path / "x.npz", **statistics_of(REAL * 0)))
    assert feed(metrics, FAKE, IDS).compute()["fd_plain"] == pytest.approx(measured().compute()["fid"], rel=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "not uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"\(2, 3, 8, 8\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8, order="F")}, "in C order"),
        ({"mu": np.zeros(12)}, "no mu and sigma|no mu_s"),
        ({"mu": np.zeros(9), "sigma": np.eye(9), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}, "no images `arr_0`"),
        ({"mu": np.zeros(12), "sigma": np.eye(12)}, "no mu_s and sigma_s"),
        ({"arr_0": np.array([{}])}, "arr_0 is object"),
    ],
)
def test_bad_npz_files_are_named(tmp_path, entries, message):
    np.savez(tmp_path / "x.npz", **entries)
    with pytest.raises(UserError, match=rf"x\.npz.*({message})"):
        GenerationMetrics(Pixels(), **ALL).load_reference(tmp_path / "x.npz")


def test_bad_reference_files(tmp_path):
    metrics = GenerationMetrics(Pixels(), **ALL)
    with pytest.raises(UserError, match="not found"):
        metrics.load_reference(tmp_path / "no.npz")
    with pytest.raises(UserError, match=r"neither \.npz"):
        metrics.load_reference(tmp_path / "x.pkl")
    (tmp_path / "x.npz").write_bytes(b"no zip at all")
    with pytest.raises(UserError, match=r"x\.npz is no \.npz"):
        metrics.load_reference(tmp_path / "x.npz")
    path = write_npz(tmp_path / "y.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        metrics.load_reference(path)
    np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(UserError, match=r"9 dimensions.*with 12"):
        GenerationMetrics(Pixels()).load_reference(path)


def test_reference_that_lacks_something():
    reference = measured().reference("val")
    metrics = GenerationMetrics(Pixels(), **ALL)
    with pytest.raises(UserError, match=r"\(val\) has no statistics for sFID"):
        metrics.set_reference(replace(reference, spatial_mean=None))
    with pytest.raises(UserError, match=r"\(val\) has no features for precision"):
        metrics.set_reference(replace(reference, sample=None))
    with pytest.raises(UserError, match="'inception' with 12 dimensions, this metric uses 'plain'"):
        GenerationMetrics(Plain()).set_reference(reference)
    metrics.set_reference(reference)
    with pytest.raises(UserError, match=r"16x16 pixels after images .* 8x8"):
        metrics.update(torch.rand(2, 3, 16, 16), torch.arange(2))


# protocols


def test_protocol_line():
    metrics = measured()
    metrics.compute()
    assert metrics.conditions == (
        "no protocol: 130 images of 8x8 px, labels unknown, features inception, reference unnamed (150 images, "
        "ADM centre crop)"
    )
    metrics = GenerationMetrics(Pixels(), protocol=Protocol("p", "inception", 130, "val", "ab", 150))
    metrics.set_reference(measured().reference("val abc"))
    metrics.update(FAKE, IDS, torch.arange(130) % 10)
    metrics.compute()
    assert metrics.conditions.startswith("p: 130 images of 8x8 px, labels balanced (13 of each of 10), features incep")
    metrics.reset()
    metrics.update(FAKE, IDS, torch.arange(130) % 11)
    metrics.compute()
    assert "labels not balanced (11 to 12 of each of 11)" in metrics.conditions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 129}, "129 images, 130 were measured"),
        ({"reference": "VIRTUAL"}, r"VIRTUAL\*, this one is: val abc"),
        ({"reference_hash": "d"}, "hash d, this one is: val abc"),
        ({"reference_count": 50_000}, r"50,000 images, this one \(val abc\) has 150"),
        ({"features": "dino"}, "features 'dino', these are 'inception'"),
    ],
)
def test_protocol_is_kept(wrong, message):
    right = Protocol("p", "inception", 130, "val", "ab", 150)
    reference = measured().reference("val abc")

    def measure(protocol):
        metrics = GenerationMetrics(Pixels(), protocol=protocol)
        metrics.set_reference(reference)
        metrics.update(FAKE, IDS)
        metrics.compute()

    measure(right)
    with pytest.raises(UserError, match=f"protocol p wants .*{message}"):
        measure(replace(right, **wrong))


def test_protocol_is_kept_where_the_reference_is_measured_too():
    with pytest.raises(UserError, match="wants a reference of 149 images"):
        measured(protocol=Protocol("p", reference_count=149)).compute()
    with pytest.raises(UserError, match=r"features 'dino', the reference .* has 'inception'"):
        Protocol("p", "dino").check_reference(measured().reference())


def test_named_protocols():
    adm, val, other = (find_protocol(name) for name in ("gfid-adm50k", "rfid-val50k", "fd-dinov2"))
    assert {x.count for x in (adm, val, other)} == {50_000}
    assert (adm.features, val.features, other.features) == ("inception", "inception", "dinov2")
    assert find_protocol("fd-dinov2", "12ab").reference_hash == "12ab"
    assert GenerationMetrics(Pixels(), protocol="mind-5k").mind
    reference = measured().reference
    with pytest.raises(UserError, match="VIRTUAL_imagenet"):
        adm.check_reference(reference("val50k"))
    with pytest.raises(UserError, match="an unknown number"):  # rFID against ADM's file: the classical mistake
        val.check_reference(replace(reference("VIRTUAL_imagenet256_labeled.npz"), count=0))
    adm.check_reference(replace(reference("VIRTUAL_imagenet256_labeled.npz"), count=0))
    val.check_reference(replace(reference("val"), count=50_000))
    for name in ("gfid", "fd-", ""):
        with pytest.raises(
            UserError, match="gfid-adm50k, rfid-val50k, mind-5k, fdr6, fd-coco, fd-coco6k or fd-<feature>"
        ):
            find_protocol(name)


# ranks


def compute_on_rank(folder):
    """Two ranks share the images unevenly; the last one sees no real image at all."""
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank)
    share = slice(0, 90) if rank == 0 else slice(90, None)
    results = []
    for options in (ALL, {}):
        metrics = GenerationMetrics(Pixels(), **options)
        feed(metrics, REAL[: 0 if rank else None], torch.arange(0 if rank else 150), real=True)
        results.append(feed(metrics, FAKE[share], IDS[share]).compute())
    metrics = GenerationMetrics(Pixels(), **ALL)
    metrics.load_reference(f"{folder}/reference.npz", batch_size=16)
    empty = GenerationMetrics(Pixels())
    empty.set_reference(metrics.given)
    results.append(feed(metrics, FAKE[rank::2], IDS[rank::2]).compute())
    results.append(feed(empty, FAKE[: 0 if rank else None], IDS[: 0 if rank else None]).compute())
    return results, metrics.conditions


def test_two_processes_equal_one(tmp_path):
    write_npz(tmp_path / "reference.npz")
    expected = measured().compute()
    (first, line), (second, other_line) = run_ranks(2, compute_on_rank, tmp_path)
    assert (first, line) == (second, other_line)
    assert "130 images" in line
    both, fid_alone, with_file, idle = first
    assert both == pytest.approx(expected, rel=1e-8)
    assert with_file == pytest.approx(expected, rel=1e-8)
    assert fid_alone == pytest.approx({"fid": expected["fid"]}, rel=1e-8)
    assert idle == pytest.approx(fid_alone, rel=1e-8)
