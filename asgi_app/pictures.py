"""A picture's bytes -> the ink of the one digit in it, as the digits model wants it.

Pure: bytes and a Pillow image in, an array or one of our errors out; no socket, no loop, no model. Two steps, so that
the cheap one can refuse before the dear one begins: `open_picture` reads headers only, `ink` decodes the pixels.

Whatever the bytes are, the answer is a picture, an array or an error of `engine.errors`. Pillow meets hostile bytes
with a dozen types of exception and a few warnings, so each call into its parsers stands in `_hostile`.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

# Imported for their effect: each registers itself with Image.open, which otherwise imports every plugin that there is.
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

from engine.errors import InvalidInput, TooLarge, Unsupported

_FORMATS = ("PNG", "JPEG", "WEBP")
_TAKEN = "send a PNG, JPEG or WebP picture"

# (offset, first bytes, name): what people send instead. A table and not Pillow's own detection: that means letting
# every parser it has, each with its own holes, at the caller's bytes only to word a refusal.
_REFUSED = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
)

# EXIF tag 0x0112 -> what turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The longer side, in pixels, to which a larger picture is averaged down before anything is measured in it (the result
# is below twice this). Enough for a digit that fills a tenth of the picture, and it evens out the paper's noise.
_WORKING_SIDE = 256
# Less contrast than this, of the full range from black to white, is no ink.
_FAINTEST = 0.06


# What Pillow reads step by step in Python, or decodes once more for each: no camera or program writes as many.
_MOST_PARTS = 1000  # chunks of a PNG, segments of a JPEG, before the first pixels
_MOST_SCANS = 100  # of a progressive JPEG


@contextmanager
def _hostile(what: str) -> Iterator[None]:
    """Whatever Pillow raises in here becomes InvalidInput("picture: " + what); its warnings stay in here."""
    # Only PIL's own warnings are ignored: before Python 3.14 the filters belong to the process, and two threads that
    # leave this block in the wrong order leave the innermost filter behind.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except Exception as problem:
            raise InvalidInput(f"picture: {what}; {_TAKEN}") from problem


def open_picture(body: bytes, max_pixels: int) -> Image.Image:
    """Read the headers of an encoded picture; no pixel is decoded.

    Args:
        body: a PNG, JPEG or WebP file.
        max_pixels: the most pixels, width x height, that are taken. Above 178,956,970 Pillow's own bound applies.

    Raises:
        InvalidInput: empty, no picture, a damaged header, or animated.
        TooLarge: it announces more than `max_pixels` pixels.
        Unsupported: a picture in another format.
    """
    if not body:
        raise InvalidInput(f"picture: the body is empty; {_TAKEN}")
    for offset, magic, name in _REFUSED:
        if body.startswith(magic, offset):
            raise Unsupported(f"picture: {name} is not taken; {_TAKEN}")
    if _parts(body) > _MOST_PARTS or (body[:2] == b"\xff\xd8" and body.count(b"\xff\xda") > _MOST_SCANS):
        raise InvalidInput(
            f"picture: more than {_MOST_PARTS} chunks or {_MOST_SCANS} scans take too long to read; save it again"
        )
    too_large = f"at most {max_pixels} pixels (width x height) are taken; send a smaller one"
    with _hostile("not a picture, or its header is damaged"):
        try:
            picture = Image.open(io.BytesIO(body), formats=_FORMATS)
        except Image.DecompressionBombError:
            picture = None
    if picture is None:
        raise TooLarge(f"picture: its header announces far too many pixels; {too_large}")
    if picture.width * picture.height > max_pixels:
        raise TooLarge(f"picture: {picture.width} x {picture.height} pixels; {too_large}")
    # A JPEG may carry more pictures behind the first (a preview, a depth or gain map): phones do that, it still is one.
    if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
        raise InvalidInput("picture: animated, so it is unclear which frame is meant; send a still picture")
    return picture


def _parts(body: bytes) -> int:
    """How many chunks of a PNG, or segments of a JPEG, come before its pixels; counted no further than needed."""
    parts, size = 0, len(body)
    if body.startswith(b"\x89PNG"):
        at = 8
        while at + 8 <= size and body[at + 4 : at + 8] != b"IDAT" and parts <= _MOST_PARTS:
            at += 12 + int.from_bytes(body[at : at + 4])
            parts += 1
    elif body.startswith(b"\xff\xd8"):
        at = 2
        while at + 4 <= size and body[at + 1] != 0xDA and parts <= _MOST_PARTS:
            # A filler byte, or garbage between segments, is a step as well.
            at += 2 + int.from_bytes(body[at + 2 : at + 4]) if body[at] == 0xFF and body[at + 1] != 0xFF else 1
            parts += 1
    return parts


def ink(picture: Image.Image, height: int, width: int) -> NDArray[np.float32]:
    """Decode the picture and find the one digit in it, dark on light or light on dark.

    The paper is what most of the border is; the ink is what differs from it most. As in scikit-learn's digits the digit
    stands in the full height of the box, in the middle, seven eighths of the width being the most it takes, and its
    darkest cell is 1. Each cell is the mean of the ink under it.

    Args:
        picture: from `open_picture`; decoded in place, a large JPEG at a fraction of its size.
        height, width: the box, in cells.

    Returns:
        float32, [1, height, width], C-contiguous, 0 = paper to 1 = ink.

    Raises:
        InvalidInput: the pixels are damaged or truncated, or no ink is there.
    """
    levels = _levels(picture)
    darkest, lightest = levels.min(), levels.max()
    border = _border(levels)
    light = border > (darkest + lightest) / 2
    dark_ink = 2 * np.count_nonzero(light) >= border.size
    paper_border = np.sort(border[light if dark_ink else ~light])
    paper = paper_border[paper_border.size // 2]
    full = paper - darkest if dark_ink else lightest - paper
    # More than the bound is no noise, but a digit cut out so narrowly that its soft edges are on the border. Without
    # ink the whole picture stays within 10 of these (measured: normal noise, as it is and after JPEG).
    noise = min(float(np.sqrt(np.mean(np.square(paper_border - paper)))), 0.03)
    if full < max(_FAINTEST, 11 * noise):
        raise InvalidInput("picture: no ink, all of it has one colour; send one digit with some paper around it")
    # Paper down to 0 and ink up to 1 in spite of noise, of JPEG's ripples and of a pen that does not cover.
    floor = max(0.1 * full, 6 * noise)
    contrast = paper - levels if dark_ink else levels - paper
    strength = np.clip((contrast - floor) / (0.9 * full - floor), 0.0, 1.0)

    inked = strength > 0.25
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    pitch = max((bottom - top) / height, (right - left) / (0.875 * width))  # pixels per cell, the same both ways
    down = _shares(levels.shape[0], (top + bottom) / 2, pitch, height)
    across = _shares(levels.shape[1], (left + right) / 2, pitch, width)
    cells = down @ strength @ across.T
    # A thin pen fills no cell. The digits that the model knows are thick: bring the fullest cell to 1.
    return np.ascontiguousarray(cells / cells.max(), dtype=np.float32)[np.newaxis]


def _border(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outermost pixels of [rows, columns], in one dimension."""
    return np.concatenate((levels[0], levels[-1], levels[:, 0], levels[:, -1]))


def _shares(pixels: int, centre: float, pitch: float, cells: int) -> NDArray[np.float32]:
    """How much of each pixel lies in each cell, over the cell's size: float32 [cells, pixels].

    Averaging by exact area is anti-aliased at any scale, and a cell beyond the picture's edge holds paper there.
    """
    starts = (centre + (np.arange(cells, dtype=np.float32) - cells / 2) * pitch)[:, np.newaxis]
    pixel = np.arange(pixels, dtype=np.float32)
    overlap = np.minimum(starts + pitch, pixel + 1) - np.maximum(starts, pixel)
    shares: NDArray[np.float32] = (np.maximum(overlap, 0.0) / pitch).astype(np.float32)
    return shares


def _levels(picture: Image.Image) -> NDArray[np.float32]:
    """The decoded picture, upright and not much larger than needed: float32 [rows, columns], 0 = black, 1 = white."""
    with _hostile("its pixels are damaged or cut off"):
        # JPEG only: decodes at a half, quarter or eighth of the size, and brightness only, at a fraction of the cost.
        picture.draft("L", (_WORKING_SIDE, _WORKING_SIDE))
        picture.load()
        if picture.mode.startswith("I"):  # 16-bit grey; convert("L") would cut off the fine half of its range
            plain, white = picture.convert("F"), 65535
        else:
            plain, white = picture.convert("RGBA" if picture.has_transparency_data else "L"), 255
        factor = max(plain.size) // _WORKING_SIDE
        if factor > 1:
            plain = plain.reduce(factor)
    try:
        with _hostile("its EXIF data are damaged"):
            turn = _UPRIGHT.get(picture.getexif().get(0x0112, 1))
    except InvalidInput:
        turn = None  # the pixels are sound, and most cameras are held upright
    if turn is not None:
        plain = plain.transpose(turn)
    if plain.mode == "RGBA":
        return _on_paper(plain)
    levels: NDArray[np.float32] = np.asarray(plain, dtype=np.float32) / np.float32(white)
    return levels


def _on_paper(picture: Image.Image) -> NDArray[np.float32]:
    """Fill in what is transparent with paper: RGBA picture -> float32 [rows, columns], 0 = black, 1 = white.

    The rim is where the opaque part ends, at a transparent one or at the picture's edge. Where something stands out
    against the rim, the rim is the paper. Otherwise only the ink was drawn, in any colour: the paper is then black or
    white, whichever is further from it.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float32) / np.float32(255)
    alpha = np.asarray(picture.getchannel("A"), dtype=np.float32) / np.float32(255)
    opaque = alpha > alpha.max() / 2
    if not opaque.any():
        return np.zeros_like(grey)
    framed = np.pad(opaque, 1)
    inner = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    seen = grey[opaque]
    rim = np.median(grey[opaque & ~inner])
    stands_out = max(rim - seen.min(), seen.max() - rim) > 1 / 3
    paper = rim if stands_out else np.float32(seen.mean() < 0.5)
    levels: NDArray[np.float32] = paper + (grey - paper) * alpha
    return levels
