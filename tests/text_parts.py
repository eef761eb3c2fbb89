"""What a recipe can name in place of parts that take long to make."""

from aligntok.networks import Tokenizer
from tests.conftest import Tiny


def tokenizer() -> Tokenizer:
    """Return a measured tokenizer of 16 px images, f4."""
    return Tiny.measured()
