"""``aligntok fetch``: from a server to the folder where runs look first; then no socket is opened."""

from __future__ import annotations

import hashlib
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from aligntok.__main__ import main
from aligntok.networks import VisionEncoder
from aligntok.programs import fetch
from aligntok.published import published_state

NAME = "test_vit.r160_in1k"  # timm's own for tests: 0.4 million weights


class Server(SimpleHTTPRequestHandler):
    """Says the SHA-256 of a file, as the hub does."""

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"' if path.is_file() else "none")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder in place of the addresses that are published; return the folder and a config that needs both."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()  # an older hub's may be offline by another test
    folder = tmp_path / "served"
    folder.mkdir()
    save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    torch.save({"weight": torch.ones(3)}, folder / "net.pth")
    judge = f"net-{hashlib.sha256((folder / 'net.pth').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "net.pth").rename(folder / judge)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(fetch, "hf_hub_url", lambda repository, file: f"{base}/{file}")
        monkeypatch.setitem(fetch.URLS, "LPIPS", f"{base}/{judge}")
        monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        encoder = {"class_path": "aligntok.networks.VisionEncoder", "init_args": {"name": NAME}}
        config = {"model": {"encoder": encoder, "loss": [{"class_path": "aligntok.losses.LPIPS"}]}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        yield folder, str(tmp_path / "config.yaml"), f"{base}/{judge}"
        http.shutdown()


def test_what_was_fetched_is_found_without_a_socket(server, tmp_path, monkeypatch, capsys):
    folder, config, judge = server
    assert main(["fetch", config]) == 0
    assert capsys.readouterr().out.count("  fetched\n") == 2
    assert main(["fetch", config]) == 0
    assert capsys.readouterr().out.count("  was there\n") == 2

    def refuse(*args, **kwargs):
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    theirs = timm.models.load_state_dict(folder / "model.safetensors")
    encoder = VisionEncoder(NAME, 160, 16)
    assert torch.equal(encoder.backbone.state_dict()["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])
    assert torch.equal(published_state(judge, "the test")["weight"], torch.ones(3))
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "home" / fetch.SUMS).read_text().splitlines())
    assert sums[f"{NAME}.safetensors"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "home" / f"{NAME}.safetensors").write_bytes(b"other")
    assert main(["fetch", config]) == 2
    assert "is not what was published, or fetched before" in capsys.readouterr().out


def test_what_cannot_be_had_is_a_line_each(server, tmp_path, capsys):
    folder, config, _ = server
    for path in folder.iterdir():
        path.unlink()
    assert main(["fetch", config]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert all(f"there as {tmp_path / 'home'}" in line for line in lines)
    assert "2 of 2 files could not be had" in printed.err
    assert main(["fetch", "photos/stage1.yaml"]) == 0
    assert "need no published weights" in capsys.readouterr().out
