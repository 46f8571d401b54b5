"""Draws which visual tokens of a picture are kept: their patches as they are, the others dimmed."""

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from structprune.models.processor import missing_vision
from structprune.report.patches import Patches
from structprune.report.plots import INK, PALETTE

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of a panel at least, between panels, and of letters; a small picture is enlarged by a whole number.
PANEL, GAP, LETTERS = 384, 24, 20
# What is left of the brightness of a dropped patch.
DIMMED = 0.3
EDGE = 2


def kept_tokens(patches: Patches, panels: Mapping[str, Tensor], title: str) -> bytes:
    """Draw a picture once for each choice of tokens, side by side; return a PNG.

    Args:
        patches: The picture.
        panels: What stands above each -> which visual tokens are kept, bool [tokens].
        title: What stands above all; cut where it does not fit.

    Raises:
        EnvironmentFailure: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError as error:
        raise missing_vision(error) from None
    font = ImageFont.load_default(LETTERS)
    drawn = [_panel(patches, kept) for kept in panels.values()]
    height, width = drawn[0].shape[1:]
    top = GAP + 4 * LETTERS
    # White, so that letters can be read on a dark page too.
    card = Image.new("RGB", (GAP + len(drawn) * (width + GAP), top + height + GAP), "white")
    write = ImageDraw.Draw(card)
    write.text((GAP, GAP), _fitting(title, card.width - 2 * GAP, font), INK, font)
    for number, (said, pixels) in enumerate(zip(panels, drawn, strict=True)):
        left = GAP + number * (width + GAP)
        write.text((left, GAP + 2 * LETTERS), said, INK, font)
        card.paste(_image(pixels), (left, top))
    with BytesIO() as buffer:
        card.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def _panel(patches: Patches, kept: Tensor) -> Tensor:
    """Return the picture with all but some patches dimmed, shape [3, height, width], uint8."""
    scale = max(1, -(-PANEL // max(patches.pixels.shape[1:])))
    pixels = _larger(patches.pixels.float(), scale)
    height, width = pixels.shape[1:]
    rows = torch.arange(height) * patches.rows // height
    columns = torch.arange(width) * patches.columns // width
    there = patches.parts(kept)[rows][:, columns]
    grey = pixels.mean(0, keepdim=True).expand_as(pixels) * DIMMED
    # On a dark picture brightness alone tells little: what is kept has an edge.
    gone = functional.pad((~there).float()[None], [EDGE] * 4, value=1.0)
    edge = there & functional.max_pool2d(gone, 2 * EDGE + 1, stride=1)[0].bool()
    colour = torch.tensor([int(PALETTE[1][start : start + 2], 16) for start in (1, 3, 5)])
    drawn = torch.where(there, pixels, grey)
    return torch.where(edge, colour[:, None, None].float(), drawn).round().to(torch.uint8)


def _larger(pixels: Tensor, scale: int) -> Tensor:
    return pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _image(pixels: Tensor) -> "Image":
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _fitting(text: str, width: int, font: Any) -> str:
    """Return a text on one line, cut where it is wider than so many pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
