"""CLIP score and R@1 on a CLIP of random weights: torchmetrics' number, and a count of the nearest captions."""

import inspect
import json
import re
import string

import pytest
import torch
from torch import nn

from aligntok.data.prompts import PromptSamples, read_prompts
from aligntok.errors import UserError
from aligntok.metrics import CaptionAlignment, find_protocol
from aligntok.metrics.alignment import load_clip, retrieval
from tests.test_evaluate import REAL, evaluate, pictures, write_folder, write_npz

CAPTIONS = ["two foxes", "a car above a pizza", "a fox", "three sheep on a red ground and more words than fit", "a"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # transformers' own


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP that spells."""
    transformers = pytest.importorskip("transformers")
    words = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), "<|startoftext|>"]
    vocabulary = {word: id for id, word in enumerate([*words, "<|endoftext|>"])}
    ends = {"bos_token_id": len(words) - 1, "eos_token_id": len(words)}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 24}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(1)
    network = transformers.CLIPModel(config)
    network.visual_projection.weight.data.neg_()  # with these weights most cosines are positive then
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images():
    return torch.rand(5, 3, 20, 24)


class Plain(nn.Module):
    """A CLIP whose features are tensors, as torchmetrics takes them; transformers 5 gives more."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config

    def get_image_features(self, pixels):
        return self.tensor(self.network.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids, mask):
        return self.tensor(self.network.get_text_features(input_ids=ids, attention_mask=mask))

    def tensor(self, output):
        return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_the_score_is_that_of_torchmetrics(clip, images):
    from torchmetrics.multimodal import CLIPScore

    if "Callable" not in str(inspect.signature(CLIPScore)):
        pytest.skip("CLIPScore of an older torchmetrics takes names alone")
    network, processor = load_clip(clip)
    alignment = CaptionAlignment(clip)
    short = [caption[:10] for caption in CAPTIONS]  # of longer ones torchmetrics cuts off the last token, too
    alignment.update(images, short)
    theirs = CLIPScore(lambda: (Plain(network), processor))
    theirs.update(list(images.mul(255).round().byte()), short)
    ours = alignment.compute()["clip_score"]
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert ours > 0  # else both would be cut to 0
    other = CaptionAlignment(lambda: (network, processor))
    for rows in ([3, 4], [0], [2, 1]):
        other.update(images[rows], [short[row] for row in rows], torch.tensor(rows))
    assert other.compute() == pytest.approx(alignment.compute(), rel=1e-5)


def test_the_nearest_caption_counts(clip, images):
    alignment = CaptionAlignment(clip)
    alignment.update(images, CAPTIONS)
    similarity = alignment.image_features(images) @ alignment.text_features(CAPTIONS).T
    expected = (similarity.argmax(1) == torch.arange(5)).float().mean().item()
    assert alignment.compute()["clip_r1"] == pytest.approx(expected)
    assert alignment.conditions.endswith("of 5 images, R@1 among 5 captions")


def test_retrieval_by_hand():
    text = torch.nn.functional.normalize(torch.randn(300, 16), dim=1)
    caption = torch.randperm(10**6)[:300]
    assert retrieval(text, text, caption) == (1.0, 100)
    twice = torch.arange(300) // 2  # two images of each caption: the same caption is no other candidate
    assert retrieval(text[twice], text[twice], caption[twice], 1000) == (1.0, 150)
    image = torch.nn.functional.normalize(text + 0.5 * torch.randn(300, 16), dim=1)
    rank, found = caption.argsort().argsort(), 0
    for i in range(300):  # those with the next 99 numbers, in a circle
        others = ((rank - rank[i]) % 300 > 0) & ((rank - rank[i]) % 300 < 100)
        assert others.sum() == 99
        found += bool(image[i] @ text[i] > (text[others] @ image[i]).max())
    assert 0 < found < 300
    assert retrieval(image, text, caption) == (found / 300, 100)
    assert retrieval(text[:2], text[:2], torch.tensor([4, 4])) == (1.0, 1)


def test_no_clip(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"there is no CLIP .* here .*Without the hub, put its config\.json"):
            CaptionAlignment(str(folder)).load()
    with pytest.raises(UserError, match="1 images have 2 captions"):
        CaptionAlignment("any").update(torch.rand(1, 3, 8, 8), ["a", "b"])


def test_evaluate_measures_samples_of_prompts(clip, tmp_path, capsys):
    """A folder in either layout, an .npz with a file of prompts, and numbers that are those of the arrays."""
    samples, records = pictures(8, 0), {}
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:4]))
    alignment = CaptionAlignment(clip)
    for layout in ("png", "geneval"):
        asked = PromptSamples(read_prompts(tmp_path / "prompts.txt"), 2, layout)
        asked.write_list(tmp_path / layout)
        for id, image in enumerate(samples):
            write_folder(tmp_path / layout, [image], asked.name(id))
        real = write_folder(tmp_path / "real", REAL)
        records[layout] = evaluate(tmp_path / layout, real, "--clip", clip, "--fid")
    alignment.update(torch.from_numpy(samples).permute(0, 3, 1, 2) / 255, [asked.prompt(id).text for id in range(8)])
    for record in records.values():
        assert {key: record["values"][key] for key in ("clip_score", "clip_r1")} == pytest.approx(alignment.compute())
        assert re.search(
            r"prompts sha256:[0-9a-f]{16}, features tf_eff.*; CLIP .* among 4 captions", record["conditions"]
        )
    hashes = {re.findall(r"sha256:(\w+)", record["conditions"])[0] for record in records.values()}
    assert len(hashes) == 1
    npz = write_npz(tmp_path / "samples.npz", samples)
    (tmp_path / "each.txt").write_text("\n".join(asked.prompt(id).text for id in range(8)))
    from aligntok.programs.evaluate import evaluate_command

    evaluate_command([str(npz), "--clip", clip, "--prompts", str(tmp_path / "each.txt"), "--device", "cpu"])
    (alone,) = json.loads((tmp_path / "evaluation.json").read_text())
    assert alone["values"] == pytest.approx(alignment.compute())
    assert alone["reference"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clip", "x"], "does not say what its images were asked to show: give --prompts FILE"),
        (["--clip", "x", "--prompts", "few.txt"], "--prompts few.txt has 1 prompts for 2 samples"),
        (["--clip", "x", "--fid"], "--reference is missing"),
        ([], "--reference is missing"),
        (["--reference", "samples.npz", "--prompts", "few.txt"], "--prompts has no effect without --clip"),
        (["--reference", "samples.npz", "--protocol", "fd-coco"], "does not say what its images were asked to show"),
    ],
)
def test_what_evaluate_refuses(words, message, in_folder, fails):
    write_npz(in_folder / "samples.npz", pictures(2, 0))
    (in_folder / "few.txt").write_text("a fox\n")
    assert message in fails("evaluate", "samples.npz", *words)


def test_the_protocol_knows_the_prompts():
    protocol = find_protocol("fd-coco")
    assert (protocol.count, find_protocol("fd-coco6k").count, protocol.prompts) == (30_000, 6_000, "")
