"""The demo: what its page calls, and the page itself in a browser where there is one."""

import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from aligntok.errors import UserError
from aligntok.flow import Euler
from aligntok.programs.demo import Demo, load_demo, make_page, picture
from aligntok.weights.checkpoint import write_exported
from tests.programs.test_sample_prompts import generator as prompted

PARTS = {
    "encoder": ("ConvEncoder", {"latent_dim": 4, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "num_groups": 4}),
    "adapter": ("LinearAdapter", {"width": 8, "latent_dim": 4}),
    "decoder": ("ConvDecoder", {"latent_dim": 4, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "num_groups": 4}),
}


def pixels(pictures):
    return np.stack([np.asarray(image) for image in pictures]).astype(int)


def test_it_draws_the_samples_of_the_generator(tiny):
    generator = tiny.generator(sampler=Euler(3))
    demo = Demo(generator)
    assert (demo.asks_for, demo.num_classes) == ("class", 12)
    drawn = demo.draw("7", count=3, seed=5)
    generator.seed = 5
    expected = generator.predict_step({"id": torch.arange(3), "label": torch.full((3,), 7)}, 0)["image"]
    assert abs(pixels(drawn)[:, ::16, ::16] - (expected * 255).permute(0, 2, 3, 1).numpy()).max() <= 1
    assert drawn[0].size == (256, 256)  # 16 px, enlarged
    assert (pixels(demo.draw("7", 3, 6)) != pixels(drawn)).any()
    assert (pixels(demo.draw("8", 3, 5)) != pixels(drawn)).any()


def test_it_draws_what_a_prompt_says(tiny):
    generator = prompted()
    demo = Demo(generator)
    assert demo.asks_for == "prompt"
    drawn = demo.draw("two foxes", count=2)
    expected = generator.predict_step({"id": torch.arange(2), "caption": ["two foxes"] * 2}, 0)["image"]
    assert abs(pixels(drawn)[:, ::16, ::16] - (expected * 255).permute(0, 2, 3, 1).numpy()).max() <= 1
    assert (pixels(demo.draw("a car", 2)) != pixels(drawn)).any()


@pytest.mark.parametrize(
    ("wanted", "count", "seed", "words"),
    [
        ("12", 1, 0, "class 12: give 0 to 11"),
        ("fox", 1, 0, "class 'fox': give its number, from 0 to 11"),
        ("1", 17, 0, "17 pictures: give 1 to 16"),
        ("1", 1, -1, "seed -1: give a whole number"),
    ],
)
def test_what_it_refuses(wanted, count, seed, words, tiny):
    with pytest.raises(UserError, match=words):
        Demo(tiny.generator(sampler=Euler(2))).draw(wanted, count, seed)


@pytest.mark.parametrize("discrete", [False, True])
def test_it_reconstructs(discrete, tiny):
    demo = Demo(tiny.discrete() if discrete else tiny.measured())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    reconstruction, latent, words = demo.reconstruct(image)
    with torch.no_grad():
        expected = demo.tokenizer(to_tensor(image.crop((4, 0, 20, 16)))[None])[0]
    assert (pixels([reconstruction]) == pixels([picture(expected)])).all()
    assert latent.size == (256, 256)
    kept = "18 tokens of 32 codes" if discrete else "a latent of 4x4x4 numbers"
    assert words.startswith(f"16x16 pixels became {kept}; the reconstruction has a PSNR of")
    with pytest.raises(UserError, match="which draws nothing"):
        demo.draw("0")
    with pytest.raises(UserError, match="there is no image"):
        demo.reconstruct(None)
    with pytest.raises(UserError, match="nothing would decode"):
        Demo(tiny.generator(tokenizer=None))


@pytest.fixture
def checkpoint(tmp_path):
    """An exported tokenizer."""
    parts = {
        key: {"class_path": f"aligntok.networks.{kind}", "init_args": dict(args)} for key, (kind, args) in PARTS.items()
    }
    parts["encoder"]["init_args"]["image_size"] = 16
    recipe = {"class_path": "aligntok.networks.Tokenizer", "init_args": parts}
    from aligntok.networks import Tokenizer
    from aligntok.weights.checkpoint import build

    state = {f"tokenizer.{key}": value for key, value in build(recipe, Tokenizer).state_dict().items()}
    path = tmp_path / "tokenizer.safetensors"
    write_exported(path, state, "LatentAlignment", {"tokenizer": recipe})
    return path


def test_of_a_file(checkpoint, fails):
    assert load_demo(checkpoint).asks_for == ""
    assert "there is no checkpoint no.ckpt" in fails("demo", "no.ckpt", "--device", "cpu")
    assert "--device nonsense" in fails("demo", str(checkpoint), "--device", "nonsense")
    assert "--port 0: give 1 to 65535" in fails("demo", str(checkpoint), "--port", "0")


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio(tiny):
    with pytest.raises(UserError, match=r"pip install 'aligntok\[demo\]'"):
        make_page(Demo(tiny.measured()), "tiny")


class Browser:
    """A headless Chromium through chromedriver's own protocol (WebDriver)."""

    def __init__(self, port, driver, chromium):
        self.process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}/session"
        words = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1200,1400",
        ]
        options = {"goog:chromeOptions": {"binary": chromium, "args": words}}
        session = self.until(lambda: self.call("POST", "", {"capabilities": {"alwaysMatch": options}}))
        self.address += f"/{session['sessionId']}"

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())["value"]

    def until(self, function, seconds=300):
        """Return what a function gives as soon as that is something."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := function():
                    return found
            except OSError:  # refused, or an element is not there yet
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end
            time.sleep(0.5)

    def find(self, selector):
        found = self.until(lambda: self.call("POST", "/element", {"using": "css selector", "value": selector}))
        return "/element/" + next(iter(found.values()))

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """A class in, pictures out; an image in, its reconstruction, latent and numbers out."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'aligntok[demo]'")
    if not chromium or not driver:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    port = free_port()
    script = (
        "from tests.conftest import Tiny; from aligntok.flow import Euler; from aligntok.programs.demo import *\n"
        f"make_page(Demo(Tiny.generator(sampler=Euler(3))), 'tiny').launch(server_port={port}, quiet=True)"
    )
    server = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    browser = Browser(free_port(), driver, chromium)
    try:
        browser.until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).status == 200)
        browser.call("POST", "/url", {"url": f"http://127.0.0.1:{port}"})
        field = browser.find("#wanted textarea, #wanted input")
        browser.call("POST", f"{field}/clear", {})
        browser.call("POST", f"{field}/value", {"text": "7"})
        browser.call("POST", f"{browser.find('#draw')}/click", {})
        count = "return [...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth == 256).length"
        browser.until(lambda: browser.run(count) >= 4)
        seen = np.asarray(
            Image.open(io.BytesIO(b64decode(browser.call("GET", f"{browser.find('#pictures')}/screenshot"))))
        )
        assert seen.std() > 5  # pictures are in the picture of the page

        browser.run(
            "[...document.querySelectorAll('button[role=tab]')].find(b => /Reconstruct/.test(b.textContent)).click()"
        )
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(
            tmp_path / "image.png"
        )
        browser.call("POST", f"{browser.find('#image input[type=file]')}/value", {"text": str(tmp_path / "image.png")})
        for name in ("reconstruction", "latent"):
            browser.until(
                lambda name=name: (
                    browser.run(f"const i = document.querySelector('#{name} img'); return i && i.naturalWidth") == 256
                )
            )
        words = "const t = document.querySelector('#words textarea, #words input'); return t && t.value"
        assert "a PSNR of" in browser.until(lambda: browser.run(words))
    finally:
        browser.close()
        server.terminate()
        server.wait()
