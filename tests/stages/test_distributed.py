"""Two processes on gloo are one process with twice the batch."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.stages.ddp_worker import train_all

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, then of the two ranks."""
    root = tmp_path_factory.mktemp("ddp")
    return [*run_ranks(1, train_all, root / "one"), *run_ranks(2, train_all, root / "two")], root


OTHERS = ["stage3", "kl", "alitok2", "kmeans", "dit", "ar"]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.mark.parametrize("run", ["stage1", "stage2", "causal", *OTHERS])
def test_two_ranks_equal_one(runs, run):
    (one, first, second), _ = runs
    assert one[run]["global_step"] == first[run]["global_step"] == second[run]["global_step"] == 5
    for name, value in one[run]["weights"].items():
        torch.testing.assert_close(first[run]["weights"][name], value, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}")
        assert torch.equal(first[run]["weights"][name], second[run]["weights"][name]), name
    assert first[run]["loss"] == second[run]["loss"] == pytest.approx(one[run]["loss"], rel=1e-4)  # of all images


@pytest.mark.parametrize(
    ("draw", "run"),
    [("augmentation", "stage3"), ("latent", "kl"), ("kmeans", "kmeans"), ("label of ar", "ar")]
    + [(draw, "dit") for draw in ("noise", "time", "label")],
)
def test_a_draw_by_place_instead_of_by_image_is_far_beyond_the_tolerance(runs, draw, run):
    (one, *_), _ = runs
    right, wrong = one[run]["weights"], one[f"wrong {draw}"]["weights"]
    gaps = [(wrong[name] - value).abs() / (1e-5 + 1e-3 * value.abs()) for name, value in right.items()]
    assert max(float(gap.max()) for gap in gaps) > 100


@pytest.mark.parametrize("run", OTHERS)
def test_the_other_stages_learned_far_more_than_the_tolerance(runs, run):
    (one, *_), _ = runs
    assert max(one[run]["change"].values()) > 1e-3


@pytest.mark.parametrize("run", ["stage1", "stage2"])
@pytest.mark.parametrize("part", ["tokenizer.adapter", "tokenizer.decoder", "loss.adversarial"])
def test_the_runs_learned_far_more_than_the_tolerance(runs, run, part):
    (one, *_), _ = runs
    assert max(change for name, change in one[run]["change"].items() if name.startswith(part)) > 2e-3


def test_the_adaptive_weight_is_the_same_on_all_ranks_and_that_of_the_whole_batch(runs):
    (one, first, second), _ = runs
    assert one["stage2"]["scales"][:3] == [None] * 3  # the generator does not hear the discriminator before step 3
    assert first["stage2"]["scales"] == second["stage2"]["scales"]
    scales = [run["stage2"]["scales"][3:] for run in (one, first)]
    assert len(scales[0]) == 2
    torch.testing.assert_close(torch.tensor(scales[0]), torch.tensor(scales[1]), rtol=1e-3, atol=0)


def test_latent_statistics_are_those_of_all_ranks(runs):
    (one, *ranks), _ = runs
    assert not torch.equal(one["stage2"]["weights"]["tokenizer.latent_std"], torch.ones(4, 1, 1))
    for rank in ranks:
        for key in ("tokenizer.latent_mean", "tokenizer.latent_std"):
            torch.testing.assert_close(
                rank["stage2"]["weights"][key], one["stage2"]["weights"][key], rtol=1e-6, atol=1e-7
            )


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(runs):
    (_, first, second), root = runs
    for name, value in first["nonfinite"]["weights"].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second["nonfinite"]["weights"][name]), name
    lines = [line.split(",") for line in (root / "two/nonfinite/nonfinite_steps.csv").read_text().splitlines()]
    assert sorted(line[:2] for line in lines) == [["1", "0"], ["1", "1"]]  # step, rank
    images = [set(line[2].split()) for line in lines]
    assert len(images[0] | images[1]) == 8  # both shares of the batch


def test_codes_in_little_use_moved_in_the_run_that_clusters(runs):
    (one, *_), _ = runs
    change = one["causal"]["change"]
    assert change["tokenizer.quantizer.codebook"] > 0.05
    assert change["tokenizer.quantizer.usage"] > 0.05
    assert change["tokenizer.decoder.prefix_head.colour.bias"] > 1e-3


def test_the_use_of_the_codes_is_that_of_the_images_of_all_ranks(runs):
    (one, first, second), _ = runs
    assert {"val/codebook_usage", "val/codebook_perplexity", "val/codebook_entropy"} <= one["health"].keys()
    for rank in (first, second):
        assert rank["health"] == pytest.approx(one["health"], rel=1e-5)
