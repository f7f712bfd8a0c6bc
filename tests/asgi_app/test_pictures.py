import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from asgi_app.pictures import ink, open_picture
from engine.errors import InvalidInput, RequestError, TooLarge, Unsupported

MAX_PIXELS = 2_000_000
Array = NDArray[np.float32]

# A four, as ink in 16 levels: the pattern of every drawing below.
FOUR = """
...5c...
...c6...
..5f....
..ca.45.
.6f5.ca.
.dfddfe4
..466fb.
....4f7.
"""


def drawing(side: int = 64, margin: int | tuple[int, int] = 16, light_on_dark: bool = False) -> Image.Image:
    """The four, `side` pixels high, black on white or white on black."""
    cells = [[0 if c == "." else int(c, 16) * 17 for c in line] for line in FOUR.split()]
    digit = Image.fromarray(np.array(cells, np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    across, down = margin if isinstance(margin, tuple) else (margin, margin)
    picture = Image.new("L", (side + 2 * across, side + 2 * down), 0)
    picture.paste(digit, (across, down))
    return picture if light_on_dark else picture.point(lambda level: 255 - level)


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    body = io.BytesIO()
    picture.save(body, form, **options)
    return body.getvalue()


def read(body: bytes) -> Array:
    return ink(open_picture(body, MAX_PIXELS), 8, 8)


def apart(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max())


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    """A PNG by hand: what Pillow cannot, or will not, write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + data + chunk(b"IEND", b"")


# The reference: what the drawing's ink is when nothing makes it hard.
PLAIN = read(encoded(drawing()))

VALID = {
    "png": encoded(drawing()),
    "jpeg": encoded(drawing(), "JPEG"),
    "progressive jpeg": encoded(drawing(), "JPEG", progressive=True),
    "webp": encoded(drawing(), "WEBP"),
    "lossless webp": encoded(drawing().convert("RGBA"), "WEBP", lossless=True),
    "palette": encoded(drawing().convert("P")),
    "jpeg with exif": encoded(drawing(), "JPEG", exif=Image.Exif().tobytes() + b"\0" * 8),
}
any_valid = pytest.mark.parametrize("body", VALID.values(), ids=VALID.keys())


def array_or_our_error(body: bytes) -> bool:
    """Whether it is an array, which is then as promised; any exception but a RequestError goes through."""
    try:
        cells = read(body)
    except RequestError as error:
        problem = str(error)
    else:
        assert cells.shape == (1, 8, 8)
        assert cells.dtype == np.float32
        assert cells.flags.c_contiguous
        assert np.isfinite(cells).all()
        assert cells.min() >= 0
        assert cells.max() == 1
        return True
    assert problem.startswith("picture: ")
    return False


# -- refused -----------------------------------------------------------------------------------------------------------


def test_an_empty_body_is_refused() -> None:
    """No bytes are the caller's mistake, and the text says so."""
    with pytest.raises(InvalidInput, match=r"^picture: the body is empty"):
        open_picture(b"", MAX_PIXELS)


@pytest.mark.parametrize(
    "body",
    [
        b"\0",
        b"seven",
        b'{"picture": 7}',
        np.random.default_rng(1).bytes(10_000),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\0\0\0\0WEBPVP8 ",
    ],
    ids=["a zero", "text", "json", "random", "png signature", "jpeg signature", "webp signature"],
)
def test_what_is_no_picture_is_refused(body: bytes) -> None:
    """Text, noise and bare signatures are InvalidInput, which says what to send."""
    with pytest.raises(InvalidInput, match=r"^picture: .*; send a PNG, JPEG or WebP picture$"):
        open_picture(body, MAX_PIXELS)


@any_valid
def test_a_picture_cut_off_anywhere_is_an_array_or_our_error(body: bytes) -> None:
    """Every prefix of a picture ends in an array or a RequestError; the first half never in an array."""
    for end in {*range(64), *range(64, len(body), 17), len(body) - 1}:
        if array_or_our_error(body[:end]):
            assert end > len(body) // 2


def test_a_picture_with_its_pixels_cut_off_is_refused_when_decoded() -> None:
    """The header opens, the missing pixels are found by `ink`."""
    body = VALID["jpeg"]
    picture = open_picture(body[: len(body) * 2 // 3], MAX_PIXELS)
    with pytest.raises(InvalidInput, match=r"^picture: its pixels are damaged or cut off"):
        ink(picture, 8, 8)


@pytest.mark.parametrize("side", [2_000, 10_000, 50_000], ids=["above our bound", "Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    """A few bytes that announce far too many pixels are TooLarge, with the bound in the text, before any decoding."""
    body = png(side, side, 8, 0, b"")
    assert len(body) < 100
    with pytest.raises(TooLarge, match=rf"^picture: .*at most {MAX_PIXELS} pixels"):
        open_picture(body, MAX_PIXELS)


@pytest.mark.parametrize("form", ["VP8 ", "VP8L", "VP8X"])
def test_a_webp_bomb_is_refused_by_its_header(form: str) -> None:
    """The same for WebP, whose decoder is made with its canvas when the picture is opened."""
    head = {
        "VP8 ": b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
        "VP8L": b"\x2f" + struct.pack("<I", 16382 | 16382 << 14),
        "VP8X": b"\0\0\0\0" + struct.pack("<I", 65534)[:3] + struct.pack("<I", 65534)[:3],
    }[form]
    body = form.encode() + struct.pack("<I", len(head)) + head + b"\0" * 16
    with pytest.raises(TooLarge, match=rf"^picture: .*at most {MAX_PIXELS} pixels"):
        open_picture(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body, MAX_PIXELS)


def test_the_bound_is_the_last_size_taken() -> None:
    """Exactly `max_pixels` pixels are taken, one row more is not."""
    body = encoded(Image.new("L", (100, 10)))
    assert open_picture(body, 1000).size == (100, 10)
    with pytest.raises(TooLarge, match="100 x 10 pixels; at most 999 pixels"):
        open_picture(body, 999)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animated_picture_is_refused(form: str) -> None:
    """Two frames are InvalidInput: nobody knows which one is meant."""
    body = encoded(drawing(), form, save_all=True, append_images=[drawing(light_on_dark=True)], duration=50)
    with pytest.raises(InvalidInput, match=r"^picture: animated"):
        open_picture(body, MAX_PIXELS)


@pytest.mark.parametrize(
    ("form", "name"), [("GIF", "GIF"), ("BMP", "BMP"), ("TIFF", "TIFF"), ("ICO", "ICO"), ("JPEG2000", "JPEG 2000")]
)
def test_another_format_is_refused_by_name(form: str, name: str) -> None:
    """A sound picture in another format is Unsupported, and the text says which format it is and which are taken."""
    with pytest.raises(Unsupported, match=rf"^picture: {name} is not taken; send a PNG, JPEG or WebP picture$"):
        open_picture(encoded(drawing(), form), MAX_PIXELS)


@pytest.mark.parametrize("brand", [b"avif", b"heic", b"mif1"])
def test_what_phones_send_is_refused_by_name(brand: bytes) -> None:
    """AVIF and HEIC are named too: Pillow may not know them, the caller does."""
    with pytest.raises(Unsupported, match=r"^picture: (AVIF|HEIC) is not taken"):
        open_picture(b"\0\0\0\x1cftyp" + brand + b"\0" * 20, MAX_PIXELS)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (64, 64), 255),
        Image.new("RGB", (1, 1), "red"),
        Image.new("1", (9, 3), 1),
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)),
        Image.fromarray(np.uint8(200 + np.random.default_rng(3).normal(0, 5, (100, 100)))),
    ],
    ids=["white", "one pixel", "1-bit", "transparent", "noisy"],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_picture_without_ink_is_refused(picture: Image.Image, form: str) -> None:
    """One colour, with or without noise, is InvalidInput that says that no ink is there."""
    flat = picture.convert("L") if form == "JPEG" else picture
    with pytest.raises(InvalidInput, match=r"^picture: no ink"):
        read(encoded(flat, form))


# -- any bytes ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from([b"", *(body[:n] for body in VALID.values() for n in (4, 12, 30))]), st.binary(max_size=300))
def test_any_bytes_are_an_array_or_our_error(start: bytes, rest: bytes) -> None:
    """Whatever follows a signature or the start of a header: an array or a RequestError, nothing else."""
    array_or_our_error(start + rest)


@given(st.sampled_from(sorted(VALID)), st.data())
def test_a_damaged_picture_is_an_array_or_our_error(name: str, data: st.DataObject) -> None:
    """Bytes replaced, put in or left out anywhere in a sound picture: an array or a RequestError, nothing else."""
    body = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    array_or_our_error(bytes(body))


@given(
    st.sampled_from([(1, 0), (2, 3), (8, 0), (8, 2), (8, 3), (8, 4), (8, 6), (16, 0), (16, 2), (16, 4), (16, 6)]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(
        st.tuples(st.sampled_from([b"PLTE", b"tRNS", b"eXIf", b"acTL", b"iCCP", b"gAMA"]), st.binary(max_size=24)),
        max_size=3,
    ),
    st.binary(max_size=400),
)
def test_a_png_with_any_chunks_is_an_array_or_our_error(
    kind: tuple[int, int], width: int, height: int, chunks: list[tuple[bytes, bytes]], rows: bytes
) -> None:
    """Chunks of right checksums and wild contents reach deeper into the parser: still nothing else comes out."""
    array_or_our_error(png(width, height, *kind, rows.ljust(width * height * 8 + height, b"\0"), *map_chunks(chunks)))


def map_chunks(chunks: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [chunk(name, data) for name, data in chunks]


# -- the ink -----------------------------------------------------------------------------------------------------------


def test_the_ink_is_the_digit() -> None:
    """The drawing gives its own pattern back: the full height, in the middle, ink 1 and paper 0."""
    array_or_our_error(VALID["png"])
    pattern = np.array([[0 if c == "." else int(c, 16) / 15 for c in line] for line in FOUR.split()])
    # The pattern is seven cells wide and stands half a cell to the left of the middle in its own drawing.
    assert np.corrcoef(PLAIN.ravel(), pattern.ravel())[0, 1] > 0.9
    assert PLAIN[0].max(axis=1).min() > 0.25  # ink in every row


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (16, 8), (1, 1)])
def test_the_box_is_the_callers(shape: tuple[int, int]) -> None:
    """Any height and width: float32, [1, height, width], C-contiguous."""
    cells = ink(open_picture(VALID["png"], MAX_PIXELS), *shape)
    assert cells.shape == (1, *shape)
    assert cells.dtype == np.float32
    assert cells.flags.c_contiguous


@pytest.mark.parametrize("margin", [0, 3, (5, 20), (150, 40)])
@pytest.mark.parametrize("side", [8, 13, 20, 32, 64, 200, 500, 1000])
def test_size_margin_and_which_is_dark_do_not_matter(side: int, margin: int | tuple[int, int]) -> None:
    """Dark on light and light on dark agree to 0.05; any size agrees with 64 pixels to 0.15, below 32 to 0.4."""
    dark, light = (read(encoded(drawing(side, margin, light_on_dark))) for light_on_dark in (False, True))
    assert apart(dark, light) < 0.05
    # Below 32 a pixel's width is more than a quarter of a cell, and the edges of the ink are found to a pixel.
    assert apart(dark, PLAIN) < (0.15 if side >= 32 else 0.4)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (250, 240, 90)])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_is_paper_whatever_the_ink(colour: tuple[int, int, int], form: str) -> None:
    """Only the ink was drawn, in any colour, on nothing: the same ink, to 0.05."""
    picture = Image.new("RGBA", drawing().size, (*colour, 0))
    picture.putalpha(drawing(light_on_dark=True))
    assert apart(read(encoded(picture, form, **({"lossless": True} if form == "WEBP" else {}))), PLAIN) < 0.05


def test_transparent_round_an_opaque_card_is_paper() -> None:
    """A card with a digit on it, cut out: where the card ends its paper is seen, and goes on."""
    for light_on_dark in (False, True):
        picture = Image.new("RGBA", (200, 150), (0, 0, 0, 0))
        picture.paste(drawing(light_on_dark=light_on_dark), (60, 20))
        assert apart(read(encoded(picture)), PLAIN) < 0.01


def test_transparent_corners_of_an_opaque_picture_are_paper() -> None:
    """Where the border shows the paper, what is transparent becomes that paper."""
    picture = drawing().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 10, 10))
    assert apart(read(encoded(picture)), PLAIN) < 0.01


def sixteen_bits() -> bytes:
    """0 to 4095 in 16 bits, as sensors of 12 bits give it."""
    return encoded(Image.fromarray(np.asarray(drawing(), np.uint16) * 16))


def faint() -> bytes:
    """Grey on grey, a quarter of the contrast."""
    return encoded(drawing().point(lambda level: 100 + level // 4))


def palette_with_a_transparent_colour() -> bytes:
    """The paper is a palette entry that is transparent."""
    return encoded(drawing().convert("P"), transparency=255)


@pytest.mark.parametrize(
    "body",
    [
        lambda: encoded(drawing().convert("RGB")),
        lambda: encoded(drawing().convert("LA")),
        lambda: encoded(drawing().convert("RGBA"), "WEBP", lossless=True),
        lambda: encoded(drawing().convert("P")),
        palette_with_a_transparent_colour,
        lambda: encoded(drawing().convert("RGB").convert("CMYK"), "JPEG", quality=95),
        lambda: encoded(drawing(), "JPEG", quality=95),
        sixteen_bits,
        faint,
    ],
    ids=["rgb", "grey and alpha", "rgba webp", "palette", "transparent entry", "cmyk", "jpeg", "16-bit", "faint"],
)
def test_every_kind_of_pixel_gives_the_same_ink(body: Callable[[], bytes]) -> None:
    """Grey, colour, palette, CMYK, 16-bit, faint: the same ink, to 0.05."""
    assert apart(read(body()), PLAIN) < 0.05


def test_one_bit_per_pixel_gives_nearly_the_same_ink() -> None:
    """Black or white and nothing between: the edges harden, so the cells agree in the mean, to 0.1."""
    picture = drawing(200).convert("1", dither=Image.Dither.NONE)
    assert float(np.abs(read(encoded(picture)) - PLAIN).mean()) < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_respected(orientation: int, form: str) -> None:
    """However the camera was held, the digit stands upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition of each orientation, backwards
    picture = drawing(64, (16, 40))
    if orientation in undo:
        picture = picture.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(picture, form, exif=exif, **({} if form == "PNG" else {"quality": 95}))
    assert apart(read(body), PLAIN) < 0.1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_do_not_matter(form: str) -> None:
    """Rubbish where the orientation should stand: the picture is taken as it lies."""
    body = encoded(drawing(), form, exif=b"Exif\0\0rubbish", **({} if form == "PNG" else {"quality": 95}))
    assert apart(read(body), PLAIN) < 0.1


def test_noise_and_jpeg_ripples_in_the_paper_do_not_move_the_ink() -> None:
    """Noise of 5 levels and a JPEG of quality 50, at two thirds of the contrast: the same ink, to 0.15."""
    random = np.random.default_rng(4)
    for side in (40, 64, 200):
        grey = 40 + np.asarray(drawing(side, side // 3), np.float32) * 0.67
        noisy = Image.fromarray(np.uint8(np.clip(grey + random.normal(0, 5, grey.shape), 0, 255)))
        assert apart(read(encoded(noisy, "JPEG", quality=50)), PLAIN) < 0.15


def test_a_thin_pen_gives_full_ink() -> None:
    """A hairline in a large picture is still 1 where it is darkest, and stands in the middle."""
    picture = Image.new("L", (900, 900), 255)
    picture.paste(0, (300, 100, 303, 800))
    cells = read(encoded(picture))
    assert cells.max() == 1
    assert cells[0, :, 3:5].min() > 0.9
    assert cells[0, :, :3].max() == 0


def test_a_large_jpeg_is_decoded_small() -> None:
    """Only a fraction of a large JPEG's pixels is ever decoded."""
    picture = open_picture(encoded(drawing(1000, 300), "JPEG"), 10_000_000)
    assert picture.size == (1600, 1600)
    assert apart(ink(picture, 8, 8), PLAIN) < 0.1
    assert picture.width <= 400


def test_a_png_of_a_thousand_chunks_is_refused() -> None:
    """Chunks without pixels cost Pillow time and nothing else: more than any program writes are refused, fast."""
    good = encoded(drawing())
    chunk = b"\0\0\0\0teSt" + zlib.crc32(b"teSt").to_bytes(4, "big")
    open_picture(good[:33] + chunk * 900 + good[33:], 10**6)
    for count in (1100, 500_000):
        with pytest.raises(InvalidInput, match="more than 1000 chunks"):
            open_picture(good[:33] + chunk * count + good[33:], 10**6)


def test_a_jpeg_of_a_hundred_scans_is_refused() -> None:
    """Each scan of a progressive JPEG is decoded over the whole picture: more than any program writes are refused."""
    good = encoded(drawing(), "JPEG", progressive=True)
    open_picture(good, 10**6)
    at = good.rindex(b"\xff\xda")
    with pytest.raises(InvalidInput, match="100 scans"):
        open_picture(good[:at] + good[at:-2] * 200 + good[-2:], 10**6)


def test_a_jpeg_of_a_thousand_segments_is_refused() -> None:
    """The same for comments before the pixels."""
    good = encoded(drawing(), "JPEG")
    with pytest.raises(InvalidInput, match="more than 1000 chunks"):
        open_picture(good[:2] + b"\xff\xfe\0\2" * 1100 + good[2:], 10**6)
