"""The judge learns to say what is where, and its checkpoint rebuilds it."""

import pytest
import torch

from aligntok.__main__ import main
from aligntok.data import Augmentation, EmojiScenes, EmojiTruth, LatentDataModule
from aligntok.errors import UserError
from aligntok.metrics import SceneJudge
from aligntok.stages import Optimization, SceneJudging, load_scene_judge


def scenes(seed):
    return EmojiTruth(EmojiScenes(num_images=64, seed=seed, kinds=["ground", "count"]))


def test_the_judge_learns_scenes(tiny, tmp_path):
    torch.manual_seed(0)
    data = LatentDataModule(scenes(0), 32, val=scenes(0), augmentation=Augmentation(flip=False))
    stage = SceneJudging(SceneJudge(40, 8, width=16), optimization=Optimization(1e-2))
    trainer = tiny.trainer(tmp_path, 60, limit_val_batches=1.0)
    trainer.fit(stage, datamodule=data)
    trainer.validate(stage, data, verbose=False)
    assert trainer.callback_metrics["val/accuracy"] > 0.9  # the very scenes: it has learned them by heart


def test_a_checkpoint_rebuilds_its_judge(in_folder):
    command = ["fit", "--config", "quickstart_text/judge.yaml", "--config", "run/debug.yaml", "--output", "run"]
    assert main([*command, "--data.global_batch_size", "4", "--trainer.limit_val_batches", "1"]) == 0
    judge = load_scene_judge("run/checkpoints/last.ckpt")
    assert not judge.training
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close({f"judge.{k}": v for k, v in judge.state_dict().items()}, state, rtol=0, atol=0)
    torch.save({"state_dict": {}, "hyper_parameters": {}, "aligntok_stage": "DecoderRefinement"}, "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt holds no recipe of the judge"):
        load_scene_judge("other.ckpt")


def test_a_picture_of_another_size_is_refused_when_it_is_built():
    with pytest.raises(UserError, match="image_size 40: give a multiple of 16"):
        SceneJudge(40, 8, image_size=40)
