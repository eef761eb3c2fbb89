"""Where published weights come from."""

import hashlib
import urllib.error

import pytest
import torch

from aligntok.errors import UserError
from aligntok.published import find_published, published_file, published_state


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Our folder, torch's cache, and an address whose file is in neither."""
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    source = tmp_path / "source.pth"
    torch.save({"weight": torch.arange(3.0)}, source)
    url = f"https://example.org/net-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth"
    return tmp_path / "home", tmp_path / "torch/hub/checkpoints", source, url


def test_our_folder_then_torchs_then_a_download(folders, monkeypatch):
    home, cache, source, url = folders
    name, downloads = url.rsplit("/", 1)[-1], []

    def download(url, path, prefix, progress):
        downloads.append((url, prefix))
        with open(path, "wb") as file:
            file.write(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert find_published(url) is None
    assert published_file(url, "the test") == home / name == find_published(url)
    assert downloads == [(url, name[4:12])]  # torch checks the hash in the name
    cache.mkdir(parents=True)
    (home / name).rename(cache / name)
    assert published_file(url, "the test") == cache / name
    (home / name).write_bytes(source.read_bytes())
    assert published_file(url, "the test") == home / name
    assert torch.equal(published_state(url, "the test")["weight"], torch.arange(3.0))
    assert len(downloads) == 1


def test_no_network_and_damaged_files_are_named(folders, monkeypatch):
    home, cache, source, url = folders

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    match = rf"the test needs net-.*no network.*ALIGNTOK_HOME or .*{cache.name}, or pray"
    with pytest.raises(UserError, match=match):
        published_file(url, "the test", ", or pray")
    home.mkdir(exist_ok=True)
    (home / url.rsplit("/", 1)[-1]).write_bytes(source.read_bytes()[:100])
    with pytest.raises(UserError, match="holds no weights"):
        published_state(url, "the test")
