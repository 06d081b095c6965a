"""From the bytes of an image file to its pixels: the one place that decides what they are.

Whatever loads images asks here, so that what is checked is what is read. DALI is given files that
it decodes as Pillow does, and Pillow's pixels of all others.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded. Pillow refuses about as many itself."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What a file can be, whatever its name. Pillow knows others, some of which run programs."""

MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK"))
"""Pillow's modes of 8 bits and fewer that become RGB: grey is repeated, alpha is dropped, CMYK is
(1 - C)(1 - K), …; a colour profile is not applied."""

_BRIGHT = 2**14
"""Of 16 bits: where no pixel reaches a quarter of the range, fewer bits may lie in them."""

# Pillow reports damage as any of these, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def decode_image(content: bytes, name: str) -> Pixels:
    """Decode an image as RGB: (height, width, 3).

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        ValueError: it is cut short, no image, several, of more than ``MAX_PIXELS`` pixels, or its
            values have no certain range.
    """
    with _opened(content, name) as image:
        return _pixels(image, content)


def for_dali(content: bytes, name: str) -> tuple[bytes, int, int]:
    """What DALI decodes to the pixels of :func:`decode_image`, and their height and width.

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        ValueError: as for :func:`decode_image`, as far as the header shows it.
    """
    with _opened(content, name) as image:
        as_it_is = (image.format == "JPEG" and image.mode in ("L", "RGB")) or (
            image.format == "PNG" and image.mode in MODES and _bits(image, content) <= 8
        )
        if not as_it_is:
            return as_ppm(_pixels(image, content)), image.height, image.width
        if image.format == "JPEG" and _may_be_cut(content):
            image.load()
        return content, image.height, image.width


def as_ppm(pixels: Pixels) -> bytes:
    """The file of an image (height, width, 3) that every decoder reads as it is."""
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """An image, looked at no further than its header; what is wrong with it is said of its file."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.height * image.width > MAX_PIXELS:
                raise ValueError(
                    f"it has {image.height} x {image.width} pixels, expected at most "
                    f"{MAX_PIXELS:,}; scale it down first"
                )
            # What a JPEG holds beside its image are previews of it.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise ValueError(
                    f"it holds {frames} images, expected one: save the one that counts"
                )
            yield image
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = f"its header is damaged, or its format is none of {', '.join(FORMATS)}"
            reason = reason if content else "it is empty"
        raise ValueError(
            f"{name}: expected an image file, but reading it fails: {reason}"
        ) from error


def _pixels(image: Image.Image, content: bytes) -> Pixels:
    deep = _bits(image, content) > 8
    # Pillow scales the values of a PPM file to 16 bits, whatever it says is white.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if getattr(image, "tag_v2", {}).get(262) == 0:
            raise ValueError(f"of its 16 bits 0 is white{_CONVERT}")
        values = np.asarray(image, np.float64)
        brightest = int(values.max())
        if image.format != "PPM" and 0 < brightest < _BRIGHT:
            raise ValueError(_dark(brightest))
        grey = np.round(values / 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, 2)
    if image.mode not in MODES:
        kinds = {"F": "float", "I": "32-bit"}
        raise ValueError(f"its pixels are {kinds.get(image.mode, image.mode)}{_CONVERT}")
    pixels = np.array(image.convert("RGB"))
    # Of 16 bits a channel Pillow keeps the upper 8.
    if deep and int(pixels.max()) < _BRIGHT >> 8:
        raise ValueError(_dark(int(pixels.max()) << 8))
    return pixels


_CONVERT = ", which have no certain range; expected grey or RGB of 8 bits: convert it"


def _dark(brightest: int) -> str:
    return f"of its 16 bits none is above {brightest:,} of 65,535: fewer may be used{_CONVERT}"


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a channel, as far as the header says them."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return int(np.max(getattr(image, "tag_v2", {}).get(258, 1)))
    return 8


def _may_be_cut(content: bytes) -> bool:
    """Whether a JPEG can lack its end, which DALI would not notice that decodes no more than the
    part that is asked for: its last scan has no end marker."""
    if content.endswith(b"\xff\xd9"):
        return False
    return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
