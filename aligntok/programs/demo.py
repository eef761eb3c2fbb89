"""``aligntok demo CHECKPOINT``: a generator, or a tokenizer, on a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from aligntok.callbacks.grids import latent_colours, latent_of
from aligntok.data.images import center_crop
from aligntok.errors import UserError, check
from aligntok.networks.tokenizer import Tokenizer
from aligntok.programs.parser import Parser, check_device
from aligntok.stages.generator import GeneratorStage, load_generator
from aligntok.weights.checkpoint import load_tokenizer, read_checkpoint

DESCRIPTION = """\
Show a checkpoint in the browser. A generator draws pictures of a prompt or a class; its tokenizer, or that of a stage,
takes a picture and shows its reconstruction and its latent.

  aligntok demo runs/dit/checkpoints/last.ckpt
  aligntok demo runs/stage3/checkpoints/last.ckpt --port 7861

It needs gradio: pip install 'aligntok[demo]'. The page is seen on this machine alone, unless there is a --host."""

LARGEST = 16  # pictures at once
SHOWN = 256  # pixels to which smaller pictures are enlarged


class Demo:
    """What the page shows, without the page.

    >>> from aligntok.networks import ConvDecoder, ConvEncoder, LinearAdapter
    >>> encoder = ConvEncoder(4, 8, (1, 2), num_blocks=1, image_size=16, num_groups=4)
    >>> decoder = ConvDecoder(4, 8, (1, 2), num_blocks=1, num_groups=4)
    >>> demo = Demo(Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder))
    >>> demo.reconstruct(Image.new("RGB", (20, 16)))[2]
    '16x16 pixels became a latent of 4x8x8 numbers; the reconstruction has a PSNR of ... dB'

    Args:
        shown: A generator with a tokenizer, or a tokenizer alone.

    Raises:
        UserError: A generator without a tokenizer.
    """

    def __init__(self, shown: GeneratorStage | Tokenizer) -> None:
        self.generator: GeneratorStage | None = shown if isinstance(shown, GeneratorStage) else None
        tokenizer = shown.tokenizer if isinstance(shown, GeneratorStage) else shown
        if tokenizer is None:
            raise UserError("this generator has no tokenizer: nothing would decode its samples")
        self.tokenizer: Tokenizer = tokenizer.eval()
        self.device = tokenizer.latent_mean.device

    @property
    def asks_for(self) -> str:
        """What a picture is drawn of: ``class``, ``prompt``, or nothing."""
        if self.generator is None:
            return ""
        return "prompt" if self.generator.reads_text else "class"

    @torch.no_grad()
    def draw(self, wanted: str, count: int = 4, seed: int = 0) -> list[Image.Image]:
        """Return pictures of a prompt, or of the class of a number.

        A picture is a function of (seed, its number, what is wanted), as in ``aligntok sample``.

        Raises:
            UserError: There is no such class, or the numbers are out of range.
        """
        generator: Any = self.generator
        check(generator is not None, "this checkpoint is of a tokenizer, which draws nothing: give a generator's")
        check(1 <= count <= LARGEST, f"{count} pictures: give 1 to {LARGEST}")
        check(0 <= seed < 2**32, f"seed {seed}: give a whole number from 0 to 2^32 - 1")
        batch: dict[str, Any] = {"id": torch.arange(count, device=self.device)}
        if self.asks_for == "prompt":
            batch["caption"] = [wanted] * count
        else:
            check(wanted.strip().isdigit(), f"class {wanted!r}: give its number, from 0 to {self.num_classes - 1}")
            check(int(wanted) < self.num_classes, f"class {wanted}: give 0 to {self.num_classes - 1}")
            batch["label"] = torch.full((count,), int(wanted), device=self.device)
        generator.seed = seed
        return [picture(image) for image in generator.predict_step(batch, 0)["image"]]

    @property
    def num_classes(self) -> int:
        """Number of the generator's classes, 1 without classes."""
        return int((self.generator.network.num_classes if self.generator else None) or 1)

    @torch.no_grad()
    def reconstruct(self, image: Image.Image) -> tuple[Image.Image, Image.Image, str]:
        """Return what the tokenizer makes of an image: its reconstruction, its latent in colours, and words on both.

        The image is cropped as in evaluation. The three principal components of the latent are red, green and blue.
        """
        check(image is not None, "there is no image: choose one")
        spec = self.tokenizer.spec
        cropped = to_tensor(center_crop(image.convert("RGB"), spec.image_size))[None].to(self.device)
        code = self.tokenizer.encode(cropped)
        decoded = self.tokenizer.decode(code).float()
        psnr = -10 * (decoded - cropped).square().mean().clamp_min(1e-10).log10().item()
        size = "x".join(map(str, spec.image_size))
        kept = f"{spec.sequence_length} tokens of {spec.codebook_size} codes" if spec.codebook_size else ""
        kept = kept or f"a latent of {'x'.join(map(str, spec.latent_shape))} numbers"
        words = f"{size} pixels became {kept}; the reconstruction has a PSNR of {psnr:.1f} dB"
        return picture(decoded[0]), picture(latent_colours(latent_of(self.tokenizer, code))[0]), words


def load_demo(checkpoint: str | Path, ema: float | None = None, device: str = "cpu") -> Demo:
    """Return the demo of a checkpoint; ``ema`` as of ``load_generator`` and ``load_tokenizer``.

    Raises:
        UserError: It is of neither, or there is no such device.
    """
    check_device(device)
    of_generator = "network" in (read_checkpoint(checkpoint, weights=False).get("hyper_parameters") or {})
    shown: Any = load_generator(checkpoint, ema) if of_generator else load_tokenizer(checkpoint, ema)
    return Demo(shown.to(device))


def picture(image: Tensor) -> Image.Image:
    """Return an image (3, H, W) in [0, 1] as a picture, enlarged by a whole number where it is small."""
    result: Image.Image = to_pil_image(image.float().clamp(0, 1).cpu())
    factor = max(1, SHOWN // max(result.size))
    return result.resize((result.width * factor, result.height * factor), Image.Resampling.NEAREST)


def make_page(demo: Demo, title: str) -> Any:
    """Return the page, gradio's ``Blocks``; ``launch`` serves it.

    Raises:
        UserError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs gradio: pip install 'aligntok[demo]'") from error

    def said(function: Any) -> Any:
        """Show a mistake of the user's on the page."""

        def run(*values: Any) -> Any:
            try:
                return function(*values)
            except UserError as error:
                raise gradio.Error(str(error)) from error

        return run

    def draw(wanted: str, count: float, seed: float) -> list[Image.Image]:
        return demo.draw(wanted, int(count), int(seed))

    with gradio.Blocks(title=f"aligntok {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        if demo.generator is not None:
            with gradio.Tab("Draw"):
                last = f" (0 to {demo.num_classes - 1})" if demo.asks_for == "class" else ""
                wanted = gradio.Textbox("0" if last else "", label=demo.asks_for.capitalize() + last, elem_id="wanted")
                with gradio.Row():
                    count = gradio.Slider(1, LARGEST, value=4, step=1, label="Pictures")
                    seed = gradio.Number(0, precision=0, label="Seed")
                button = gradio.Button("Draw", variant="primary", elem_id="draw")
                gallery = gradio.Gallery(label="Pictures", columns=4, elem_id="pictures", format="png")
                for event in (button.click, wanted.submit):
                    event(said(draw), [wanted, count, seed], gallery)
        with gradio.Tab("Reconstruct"), gradio.Row():
            image = gradio.Image(type="pil", label="Image", elem_id="image")
            shown = [
                gradio.Image(label=name, format="png", elem_id=name.lower()) for name in ("Reconstruction", "Latent")
            ]
            words = gradio.Textbox(label="In numbers", elem_id="words")
            image.upload(said(demo.reconstruct), image, [*shown, words])
    return page


def demo_command(arguments: list[str]) -> None:
    """Run ``aligntok demo`` with the words that follow it, until Ctrl-C.

    Raises:
        UserError: The checkpoint cannot be rebuilt, there is no gradio, or the port is taken.
    """
    parser = Parser("demo", DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="of a generator or of a tokenizer's stage")
    add("--ema", type=float, help="decay of the average to take, 0 for the raw weights; by default the first")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines see the page (default: this one alone)")
    add("--port", type=int, default=7860, help="(default: 7860)")
    options = parser.parse_args(arguments)
    check(0 < options.port < 2**16, f"--port {options.port}: give 1 to {2**16 - 1}")
    demo = load_demo(options.checkpoint, options.ema, options.device)
    page = make_page(demo, options.checkpoint.as_posix())
    try:
        page.launch(server_name=options.host, server_port=options.port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {options.port} of {options.host} cannot be had: {error}") from error
    print(f"http://{options.host}:{options.port} shows {options.checkpoint}; Ctrl-C ends", flush=True)
    page.block_thread()
