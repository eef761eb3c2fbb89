"""What is asked of a data module is looked for once, and what is missing is named."""

from types import SimpleNamespace

import pytest

from aligntok import protocols
from aligntok.data import LatentDataModule
from aligntok.errors import UserError
from aligntok.protocols import HasCache, HasNumImages, HasPreview, missing, needed_data, offered_data

EVERY = [value for name, value in vars(protocols).items() if name.startswith("Has")]


def trainer(data=None):
    return SimpleNamespace() if data is None else SimpleNamespace(datamodule=data)


@pytest.mark.parametrize("protocol", EVERY)
def test_our_data_module_offers_everything_also_before_it_is_set_up(tiny, protocol):
    data = tiny.data()
    assert missing(data, protocol) == []
    assert isinstance(needed_data(trainer(data), protocol, "Anything", "nothing"), LatentDataModule)
    assert offered_data(trainer(data), protocol) is data


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"^Grid needs a data module with preview\(\); or remove it$"):
        needed_data(trainer(), HasPreview, "Grid", "remove it")
    with pytest.raises(UserError, match=r"the data module SimpleNamespace with preview\(\)"):
        needed_data(trainer(SimpleNamespace(x=1)), HasPreview, "Grid", "remove it")


def test_half_of_a_protocol_is_a_mistake_and_none_of_it_is_an_answer():
    assert offered_data(trainer(), HasCache) is None
    assert offered_data(trainer(SimpleNamespace(x=1)), HasCache) is None
    assert offered_data(trainer(SimpleNamespace(batch_size=4, classes=["cat"])), HasNumImages) is None
    with pytest.raises(UserError, match=r"HasCache, but not has_images, check_latents, check_tokens: add these"):
        offered_data(trainer(SimpleNamespace(has_latents=True)), HasCache)
