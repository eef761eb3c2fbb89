"""The quantizer: parity with golden/README.md case f, gradients, bounded memory, ranks, and what moves the codes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aligntok.errors import UserError
from aligntok.networks import VectorQuantizer
from tests.networks.quantizer_worker import results, results_of_rank
from tests.ranks import run_ranks

# Outputs of AliTok's quantizer at commit 093e957; of zq and the gradient of z every seventh value.
pytestmark = pytest.mark.kernels
GOLDEN = {
    key: torch.from_numpy(value)
    for key, value in np.load(Path(__file__).parents[1] / "golden" / "f_vq_clustering.npz").items()
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(codebook_size=20, latent_dim=4, spread=1.0, **options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size, latent_dim, **options)
    quantizer.codebook.data = spread * torch.randn(codebook_size, latent_dim)
    return quantizer


def vectors_of(latent):
    return latent.flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("chunk_size", [1024, 5])
@pytest.mark.parametrize(("case", "seeds"), [("same", (61, 61, 61)), ("fresh", (61, 62, 63))])
def test_clustering_is_the_published_one(case, seeds, chunk_size):
    quantizer = VectorQuantizer(64, 8, chunk_size=chunk_size)
    quantizer.codebook.data = randn(64, 8, seed=1001)
    assert_close(quantizer.codebook.data, GOLDEN["embedding_initial"])
    for step, seed in enumerate(seeds, start=1):
        latent = randn(4, 8, 1, 75, seed=seed).requires_grad_()
        quantized = quantizer(latent)
        name = f"{'same' if step == 1 else case}_step{step}_"
        assert torch.equal(quantized.tokens.flatten(), GOLDEN[name + "indices"].long())
        commitment = 0.25 * quantized.commitment
        losses = torch.stack((commitment + quantized.codebook, commitment, quantized.codebook))
        assert_close(losses, GOLDEN[name + "losses"], rtol=1e-5, atol=0)
        assert_close(quantizer.usage, GOLDEN[name + "embed_prob"], rtol=1e-5, atol=0)
        assert_close(quantizer.codebook.data, GOLDEN[name + "embedding"], rtol=0, atol=1e-5)
        if step == 1:
            (losses[0] + (quantized.latent * randn(4, 8, 1, 75, seed=901)).sum()).backward()
            assert_close(quantized.latent.flatten()[::7], GOLDEN[name + "zq"], rtol=0, atol=1e-5)
            assert_close(latent.grad.flatten()[::7], GOLDEN[name + "grad_z"], rtol=0, atol=1e-5)
            assert_close(quantizer.codebook.grad, GOLDEN[name + "grad_embedding"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_tokens_are_the_nearest_codes_in_raster_order(distance):
    net, latent = quantizer(distance=distance).eval(), randn(3, 4, 5, 6)
    vectors, codes = vectors_of(latent), net.codebook.detach()
    if distance == "cosine":
        expected = (F.normalize(vectors) @ F.normalize(codes).T).argmax(1)
    else:
        expected = torch.cdist(vectors, codes).argmin(1)
    quantized = net(latent)
    assert torch.equal(quantized.tokens, expected.view(3, 30))
    assert torch.equal(net.tokens(latent), quantized.tokens)
    assert torch.equal(net.lookup(quantized.tokens).unflatten(2, (5, 6)), quantized.latent)
    if distance == "cosine":
        assert_close(quantized.latent.norm(dim=1), torch.ones(3, 5, 6))
        assert torch.equal(net.tokens(7 * latent), quantized.tokens)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("options", [{}, {"kmeans_start": True}, {"update": "ema"}, {"distance": "cosine"}])
def test_chunks_bound_the_memory_and_change_nothing(options):
    latent, results = randn(10, 2, 1, 100), []
    for chunk_size in (16, 1000):
        net = quantizer(200, 2, chunk_size=chunk_size, **options)
        with LargestTensor() as largest:
            quantized = net(latent)
        assert 0.5 < largest.elements / (chunk_size * 200) <= 1
        results.append((quantized.tokens, quantized.latent, net.codebook, net.usage))
    assert_close(results[0], results[1])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_always_float32(precision):
    """Codes closer than half precision can tell apart; a latent that comes in half precision."""
    net, dtype = quantizer(50, 4, spread=0.01).eval(), getattr(torch, precision)
    net.codebook.data += 1
    latent = net.codebook.detach().T.view(1, 4, 1, 50).clone()
    with torch.autocast("cpu", dtype):
        quantized, rounded = net(latent), net(latent.to(dtype))
        assert torch.equal(net.tokens(latent), quantized.tokens)
    assert torch.equal(quantized.tokens[0], torch.arange(50))
    assert_close(vars(rounded), vars(net(latent.to(dtype).float())), rtol=0, atol=0)
    assert rounded.latent.dtype == rounded.commitment.dtype == torch.float32


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_distances_in_float32_where_the_run_multiplies_faster(monkeypatch):
    seen, addmm = [], torch.addmm

    def recorded(*args, **kwargs):
        if args[0].dtype == torch.float32:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", recorded)
    torch.set_float32_matmul_precision("medium")
    try:
        quantizer()(randn(1, 4, 3, 3))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradient_of_the_lookup(gradient):
    net = quantizer(gradient=gradient).eval()
    latent, upstream = randn(2, 4, 3, 3).requires_grad_(), randn(2, 4, 3, 3, seed=1)
    quantized = net(latent)
    assert torch.equal(quantized.latent, net.lookup(quantized.tokens).view_as(latent.flatten(2)).view_as(latent))
    quantized.latent.backward(upstream)
    assert net.codebook.grad is None
    if gradient == "straight_through":
        assert torch.equal(latent.grad, upstream)
        return
    rows = zip(*map(vectors_of, (latent.detach(), quantized.latent.detach(), upstream, latent.grad)), strict=True)
    for e, q, g, found in rows:
        middle = F.normalize(F.normalize(e, dim=0) + F.normalize(q, dim=0), dim=0)
        rotation = torch.eye(4) - 2 * middle.outer(middle) + 2 * F.normalize(q, dim=0).outer(F.normalize(e, dim=0))
        assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-5)
        assert_close(q.norm() / e.norm() * (rotation @ e), q, rtol=0, atol=1e-5)
        assert_close(found, q.norm() / e.norm() * (rotation.T @ g), rtol=1e-4, atol=1e-5)


def test_rotation_of_an_opposite_or_zero_vector_is_finite():
    net = quantizer(2, 4, gradient="rotation").eval()
    net.codebook.data[1] = 1000  # far: the first is nearest to both
    latent = torch.stack((-net.codebook.detach()[0], torch.zeros(4)), dim=1).view(1, 4, 1, 2).requires_grad_()
    net(latent).latent.sum().backward()
    assert latent.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [[[0, 20]], [[-1, 3]]])
def test_a_token_out_of_range_is_refused(tokens):
    with pytest.raises(UserError, match="out of range: the codebook has 20 codes, 0 to 19"):
        quantizer().lookup(torch.tensor(tokens))


@pytest.mark.parametrize("update", ["gradient", "clustering", "ema"])
def test_nothing_changes_in_eval_mode(update, tiny):
    net = quantizer(update=update, kmeans_start=True).eval()
    before = tiny.copies(net)
    net(randn(2, 4, 3, 3))
    for name, value in tiny.copies(net).items():
        assert torch.equal(value, before[name]), name


def test_gradient_alone_moves_by_the_optimizer_alone():
    net = quantizer(update="gradient")
    before = net.codebook.detach().clone()
    quantized = net(randn(2, 4, 3, 3))
    assert torch.equal(net.codebook, before)
    assert net.usage.sum() > 0
    quantized.codebook.backward()
    used = quantized.tokens.flatten().unique()
    assert torch.equal(net.codebook.grad.abs().sum(1).nonzero().flatten(), used)


def test_unused_codes_come_to_life():
    net, latents = quantizer(30, spread=5.0), [randn(8, 4, 3, 3, seed=seed) for seed in range(3)]
    used = [len(net(latent).tokens.unique()) for latent in latents]
    assert used[0] < 8
    assert min(used[1:]) > 15


def test_ema_follows_the_mean_of_its_vectors():
    """On batches without an end the code is the mean over the exponential window; an unused code stays."""
    net = quantizer(2, 4, update="ema", decay=0.5)
    assert not list(net.parameters())  # no optimizer may move it, weight decay included
    net.codebook.copy_(torch.tensor([[0.0], [100.0]]).expand(2, 4))
    batches = [randn(n, 4, 1, 1, seed=n) for n in (2, 5, 3)]
    weights = [0.25, 0.5, 1.0]
    for batch in batches:
        quantized = net(batch)
        assert not quantized.codebook.requires_grad
    means = torch.stack([batch.flatten(1).mean(0) for batch in batches])
    assert_close(net.codebook[0], (means * torch.tensor(weights)[:, None]).sum(0) / sum(weights))
    assert torch.equal(net.codebook[1], torch.full((4,), 100.0))


def test_kmeans_finds_the_clusters_on_the_first_batch_only():
    centers = 10 * randn(5, 4)
    latent = (centers.repeat(20, 1) + 0.1 * randn(100, 4, seed=1)).view(100, 4, 1, 1)
    net = quantizer(40, update="gradient", kmeans_start=True)
    net(latent)
    codes = net.codebook.detach().clone()
    assert torch.cdist(vectors_of(latent), codes).min(1).values.max() < 0.3
    assert torch.cdist(codes, centers).min(1).values.max() < 0.5
    net(latent + 50)
    assert torch.equal(net.codebook, codes)


def test_vectors_that_are_not_finite_move_no_code():
    for update in ("clustering", "ema"):
        net = quantizer(update=update, kmeans_start=True)
        net(torch.full((2, 4, 3, 3), torch.nan))
        assert net.codebook.isfinite().all()


def test_counts_and_health():
    net = quantizer()
    latents = [randn(2, 4, 3, 3, seed=seed) for seed in range(2)]
    tokens = torch.cat([net(latent).tokens.flatten() for latent in latents])
    net.eval()(latents[0])
    assert torch.equal(net.counts, torch.bincount(tokens, minlength=20))
    net.reset_counts()
    assert net.counts.sum() == 0
    assert "counts" not in net.state_dict()
    health = net.health(torch.tensor([5, 0, 5, 0, 0, 5, 5, 0]))
    assert health == pytest.approx({"usage": 0.5, "perplexity": 4.0, "dead": 4})
    assert net.health(torch.zeros(8)) == {"usage": 0.0, "perplexity": 1.0, "dead": 8}


@pytest.mark.parametrize("option", [{"codebook_size": 0}, {"latent_dim": 0}, {"chunk_size": 0}, {"decay": 1.0}])
def test_bad_arguments(option):
    with pytest.raises(UserError, match=f"{next(iter(option))}="):
        VectorQuantizer(**{"codebook_size": 4, "latent_dim": 2, **option})


@pytest.fixture(scope="module")
def ranks():
    """What one process and each of two got from the same global batches."""
    return [results(0, 1), *run_ranks(2, results_of_rank)]


KMEANS = ("kmeans", "kmeans_few", "kmeans_places", "kmeans_ties")


@pytest.mark.parametrize("setup", ["clustering", "cosine", "ema", "ties", *KMEANS])
def test_two_ranks_are_one(ranks, setup):
    one, first, second = (results[setup] for results in ranks)
    for name in ("codebook", "usage", "counts"):
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], one[name]), name
    assert torch.equal(first["tokens"] + second["tokens"], one["tokens"])
    torch.manual_seed(0)
    start = VectorQuantizer(len(one["codebook"]), 4).codebook.detach()
    start = F.normalize(start) if setup == "cosine" else start
    assert ((one["codebook"] - start).abs().amax(1) > 0.1).sum() >= 8  # codes


def test_kmeans_begins_with_vectors_that_the_ids_of_the_images_choose():
    """In any order of the images: other codes in a row of their own mean that other vectors were drawn."""
    latent, ids = randn(12, 4, 1, 9), torch.randperm(100, generator=torch.Generator().manual_seed(1))[:12]
    codes = {}
    for name, order in {"as it is": slice(None), "reversed": torch.arange(11, -1, -1), "other ids": None}.items():
        net = quantizer(20, update="gradient", kmeans_start=True)
        net(latent, ids + 1) if order is None else net(latent[order], ids[order])
        codes[name] = net.codebook.detach()
    assert torch.equal(codes["as it is"], codes["reversed"])
    assert (codes["as it is"] != codes["other ids"]).any(1).sum() > 10


def test_numbers_that_are_not_finite_stay_on_their_rank(ranks):
    _, first, second = (results["bad"] for results in ranks)
    assert torch.equal(first["codebook"], second["codebook"])
    assert first["codebook"].isfinite().all()
    torch.manual_seed(0)
    start = VectorQuantizer(len(first["codebook"]), 4).codebook.detach()
    assert ((first["codebook"] - start).abs().amax(1) > 0.1).sum() >= 8  # by the other rank's vectors
