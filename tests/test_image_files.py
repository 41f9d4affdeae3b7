import io
import os
import stat
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, features
from PIL.PngImagePlugin import PngInfo

from unseg_hf import image_files
from unseg_hf.costly_files import why_tags_are
from unseg_hf.image_files import (
    ImageFileError,
    Picture,
    copy_in_place,
    encode,
    from_array,
    from_pil,
    read,
    read_mask,
    write,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Only the colour space field (bytes 16 to 20) of these is looked at.
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]
CMYK_PROFILE = SRGB[:16] + b"CMYK" + SRGB[20:]
LOSSLESS = ("png", "webp", "tiff")


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, depth, colour_type, rows, extra=b""):
    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    header = struct.pack(">LLBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def png_chunk(kind, data):
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Artist] = "José".encode("latin-1")
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.IFD.Exif] = {33434: 0.01, 36867: "2024:01:01 00:00:01", 37500: b"maker note", 0xA005: {1: "R98"}}
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.0)}
    return exif.tobytes()


def parsed(exif):
    found = Image.Exif()
    found.load(exif)
    return found


def one_line_error(call, *words):
    with pytest.raises(ImageFileError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    for word in words:
        assert word in message
    return message


# Reading kinds of pixels


@pytest.mark.parametrize(
    ("mode", "shape", "alpha"),
    [
        ("RGB", (5, 7, 3), False),
        ("RGBA", (5, 7, 3), True),
        ("L", (5, 7, 1), False),
        ("LA", (5, 7, 1), True),
        ("1", (5, 7, 1), False),
        ("P", (5, 7, 3), False),
        ("PA", (5, 7, 3), True),
        ("CMYK", (5, 7, 3), False),
        ("YCbCr", (5, 7, 3), False),
        ("LAB", (5, 7, 3), False),
        ("HSV", (5, 7, 3), False),
        ("La", (5, 7, 1), True),
        ("RGBa", (5, 7, 3), True),
        ("I;16", (5, 7, 1), False),
    ],
)
def test_each_pillow_mode_has_one_shape(mode, shape, alpha):
    picture = from_pil(Image.new(mode, (7, 5)))
    assert picture.pixels.shape == shape
    assert picture.pixels.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert (picture.alpha is not None) == alpha
    assert (picture.height, picture.width) == (5, 7)
    if mode not in ("RGB", "RGBA", "L", "LA", "I;16"):
        assert picture.notes


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bit_grey_keeps_its_values_in_any_byte_order(mode):
    values = noise(4, 6, dtype=np.uint16)
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (6, 4), values.astype(order + "u2").tobytes())
    image.info["exif"] = camera_exif(6)
    picture = from_pil(image)
    assert picture.max_value == 65535
    np.testing.assert_array_equal(picture.pixels[:, :, 0], np.rot90(values, -1))


def test_thirty_two_bit_grey_is_read_when_it_fits_sixteen_bits():
    values = np.array([[0, 65535]], dtype=np.int32)
    np.testing.assert_array_equal(from_pil(Image.fromarray(values)).pixels[:, :, 0], values)
    for outside in (np.array([[-1, 5]], np.int32), np.array([[0, 65536]], np.int32), np.array([[0.5]], np.float32)):
        one_line_error(lambda outside=outside: from_pil(Image.fromarray(outside), "deep.tif"), "deep.tif", "scale")


def test_sixteen_bit_colour_is_reduced_with_a_note():
    values = noise(4, 6, 3, dtype=np.uint16)
    picture = read(png(6, 4, 16, 2, [row.astype(">u2").tobytes() for row in values]))
    assert picture.notes == ("16-bit colour reduced to 8 bits",)
    np.testing.assert_array_equal(picture.pixels, values >> 8)
    grey = read(png(6, 4, 16, 4, [row.astype(">u2").tobytes() for row in values[:, :, :2]]))
    assert "16-bit colour reduced to 8 bits" in grey.notes
    np.testing.assert_array_equal(grey.pixels[:, :, 0], values[:, :, 0] >> 8)
    np.testing.assert_array_equal(grey.alpha, values[:, :, 1] >> 8)


def test_sixteen_bit_colour_tiff_is_reduced_with_a_note():
    values = noise(4, 6, 3, dtype=np.uint16)
    data = values.astype("<u2").tobytes()
    entries = [(256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, len(data)), (284, 3, 1, 1)]
    head = struct.pack("<2sHLH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4)
    assert len(head) == 134
    assert "16-bit colour reduced to 8 bits" in read(head + struct.pack("<HHH", 16, 16, 16) + data).notes


def test_a_transparent_colour_becomes_alpha():
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    picture = read(saved(Image.fromarray(rgb), transparency=(1, 2, 3)))
    np.testing.assert_array_equal(picture.alpha, [[0, 255]])
    np.testing.assert_array_equal(picture.pixels, rgb)
    grey = read(saved(Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=8))
    np.testing.assert_array_equal(grey.alpha, [[255, 0]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    indexed = read(saved(palette, transparency=1))
    np.testing.assert_array_equal(indexed.alpha, [[255, 0]])
    np.testing.assert_array_equal(indexed.pixels[0, 0], [10, 20, 30])


def test_a_transparent_value_of_low_bit_grey_is_stretched_like_the_pixels():
    key = png_chunk(b"tRNS", struct.pack(">H", 2))
    picture = read(png(4, 1, 2, 0, [bytes([0b00011011])], key))
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [0, 85, 170, 255])
    np.testing.assert_array_equal(picture.alpha, [[255, 255, 0, 255]])


def test_a_transparent_value_of_sixteen_bits_is_refused():
    key = png_chunk(b"tRNS", struct.pack(">H", 2))
    one_line_error(lambda: read(png(1, 1, 16, 0, [b"\0\2"], key)), "transparent", "remove")
    colour_key = png_chunk(b"tRNS", struct.pack(">HHH", 2, 2, 2))
    one_line_error(lambda: read(png(1, 1, 16, 2, [b"\0\2\0\2\0\2"], colour_key)), "transparent", "8 bits")


@pytest.mark.parametrize("profile", [None, CMYK_PROFILE, b"junk" * 50])
def test_cmyk_becomes_srgb_and_says_so(profile):
    image = Image.fromarray(noise(8, 8, 4), "CMYK")
    picture = read(saved(image, "JPEG", icc_profile=profile) if profile else saved(image, "TIFF"))
    assert picture.pixels.shape == (8, 8, 3)
    assert picture.icc_profile is None
    assert any(note.startswith("CMYK converted to sRGB") for note in picture.notes)


def test_rgb8_is_what_a_model_sees():
    deep = np.array([[[0], [128], [129], [65535], [65407], [65406]]], np.uint16)
    np.testing.assert_array_equal(Picture(deep).rgb8()[0, :, 1], [0, 0, 1, 255, 255, 254])
    picture = Picture(noise(3, 4, 3))
    copy = picture.rgb8()
    copy[:] = 0
    assert picture.pixels.any()
    assert Picture(noise(3, 4, 1)).rgb8().shape == (3, 4, 3)


def test_with_pixels_keeps_everything_else_and_the_shape():
    picture = read(saved(Image.fromarray(noise(4, 5, 4)), icc_profile=SRGB))
    other = picture.with_pixels(255 - picture.pixels)
    assert other.alpha is picture.alpha
    assert other.icc_profile == SRGB
    one_line_error(lambda: picture.with_pixels(picture.pixels[:2]), "(2, 5, 3)")
    one_line_error(lambda: picture.with_pixels(picture.pixels.astype(np.float32)), "float32")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_to_pil_is_a_fresh_image_that_reads_back(channels):
    picture = from_array(noise(4, 5, channels))
    picture = Picture(picture.pixels, picture.alpha, camera_exif(), SRGB)
    image = picture.to_pil()
    assert image.format is None
    assert image.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
    assert (image.info["icc_profile"], image.info["exif"]) == (SRGB, picture.exif)
    again = from_pil(image)
    np.testing.assert_array_equal(again.pixels, picture.pixels)
    assert again.exif == picture.exif


# Arrays


def test_arrays_of_every_accepted_kind():
    assert from_array(noise(3, 4)).pixels.shape == (3, 4, 1)
    assert from_array(noise(3, 4, 2)).alpha.shape == (3, 4)
    assert from_array(noise(3, 4, 4)).pixels.shape == (3, 4, 3)
    np.testing.assert_array_equal(from_array(np.array([[True, False]])).pixels[0, :, 0], [255, 0])
    np.testing.assert_array_equal(from_array(np.array([[0.0, 0.5, 1.0]])).pixels[0, :, 0], [0, 128, 255])
    big_endian = np.array([[1, 65535]], ">u2")
    np.testing.assert_array_equal(from_array(big_endian).pixels[0, :, 0], [1, 65535])
    source = noise(3, 4, 3)
    picture = from_array(source)
    source[:] = 0
    assert picture.pixels.any()


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((3, 10, 10), np.uint8), "(3, 10, 10)"),
        (np.zeros((2, 10, 10, 3), np.uint8), "(2, 10, 10, 3)"),
        (np.zeros((0, 10, 3), np.uint8), "(0, 10, 3)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4, 2), np.uint16), "uint16"),
        (np.full((4, 4), 200.0), "200"),
        (np.full((4, 4), -0.1), "-0.1"),
        (np.array([[0.5, np.nan]]), "nan"),
        (np.array([[0.5, np.inf]]), "inf"),
        (np.array([["a"]]), "<U1"),
    ],
)
def test_other_arrays_are_refused_by_shape_type_or_range(array, word):
    one_line_error(lambda: from_array(array, "frame 3"), "frame 3", word, "give")


def test_a_picture_of_another_shape_cannot_be_made():
    one_line_error(lambda: Picture(noise(4, 4, 4)), "(4, 4, 4)")
    one_line_error(lambda: Picture(noise(4, 4, 3), alpha=noise(3, 4)), "alpha")
    one_line_error(lambda: Picture(noise(4, 4, 1, dtype=np.uint16), alpha=noise(4, 4)), "alpha")


# Writing gives back the same


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["L", "LA", "RGB", "RGBA", "I;16"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(LOSSLESS),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_write_then_read_gives_identical_pixels_and_alpha(tmp_path_factory, mode, size, format, seed, plain):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}[mode]
    values = noise(*size, channels, dtype=np.uint16 if mode == "I;16" else np.uint8, seed=seed)
    if plain:
        values[:] = values[0, 0]
    picture = from_array(values)
    path = tmp_path_factory.mktemp("round") / f"picture.{format}"
    if mode == "I;16" and format == "webp":
        one_line_error(lambda: write(picture, path), str(path), ".png")
        return
    returned, again = write(picture, path), read(path)
    expected = picture.rgb8() if format == "webp" else picture.pixels
    for found in (returned, again):
        assert found.pixels.dtype == picture.pixels.dtype
        np.testing.assert_array_equal(found.pixels, expected)
        if found.alpha is None:
            assert picture.alpha is None or (format == "webp" and (picture.alpha == 255).all())
        else:
            np.testing.assert_array_equal(found.alpha, picture.alpha)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("format", LOSSLESS)
def test_colours_under_full_transparency_survive(format):
    picture = Picture(noise(9, 9, 3), alpha=np.zeros((9, 9), np.uint8))
    np.testing.assert_array_equal(read(encode(picture, format)).pixels, picture.pixels)


def test_tiff_of_several_strips_is_read_alike_by_pillow():
    values = noise(900, 700, 3)
    with Image.open(io.BytesIO(encode(Picture(values), "tiff"))) as image:
        assert len(image.tag_v2[273]) > 1
        np.testing.assert_array_equal(np.array(image), values)


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright_with_other_exif_kept(orientation, format):
    upright = noise(6, 4, 3)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright)
    stored = stored if undo is None else stored.transpose(Image.Transpose(undo))
    picture = read(saved(stored, "PNG", exif=camera_exif(orientation)))
    np.testing.assert_array_equal(picture.pixels, upright)
    np.testing.assert_array_equal(read_mask(saved(stored.convert("L"), exif=camera_exif(orientation))).shape, (6, 4))
    assert bool(picture.notes) == (orientation > 1)
    again = read(encode(picture, format))
    np.testing.assert_array_equal(again.pixels, upright)
    exif = parsed(again.exif)
    assert exif.get(ExifTags.Base.Orientation, 1) == 1
    assert exif[ExifTags.Base.Make] == "Maker"
    assert exif[ExifTags.Base.Artist] == "José"
    assert exif.get_ifd(ExifTags.IFD.Exif)[37500] == b"maker note"
    assert exif.get_ifd(ExifTags.IFD.GPSInfo) == {1: "N", 2: (1.0, 2.0, 3.0)}
    assert exif.get_ifd(ExifTags.IFD.Interop) == {1: "R98"}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_orientation_is_applied_once_and_dpi_turned(compression):
    upright = noise(6, 4, 3)
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    data = saved(stored, "TIFF", tiffinfo={274: 6}, dpi=(100, 200), compression=compression)
    picture = read(data)
    np.testing.assert_array_equal(picture.pixels, upright)
    assert picture.dpi == (200, 100)
    assert picture.notes == ("turned upright (EXIF orientation 6)",)
    np.testing.assert_array_equal(read(encode(picture, "tiff")).pixels, upright)


def test_a_tiff_that_says_nothing_of_resolution_has_none():
    assert read(saved(Image.fromarray(noise(6, 4, 3)), "TIFF")).dpi is None


def test_sixteen_bit_grey_whose_white_is_0_is_read_as_it_looks():
    values = noise(6, 4, dtype=np.uint16)
    data = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(read(data).pixels[:, :, 0], 65535 - values)


def test_a_gamma_that_is_not_carried_over_is_said():
    info = PngInfo()
    info.add(b"gAMA", (100_000).to_bytes(4, "big"))
    (note,) = read(saved(Image.fromarray(noise(6, 4, 3)), "PNG", pnginfo=info)).notes
    assert "gamma" in note


@pytest.mark.parametrize("format", [*LOSSLESS, "jpeg"])
def test_exif_of_a_picture_made_by_hand_cannot_turn_it(format):
    again = read(encode(Picture(noise(4, 6, 3), exif=camera_exif(6)), format))
    assert (again.height, again.width) == (4, 6)
    one_line_error(lambda: encode(Picture(noise(4, 6, 3), exif=b"junk junk"), format), format, "EXIF")


def test_exif_is_kept_byte_for_byte_but_for_the_orientation():
    before = camera_exif(8)
    picture = read(saved(Image.fromarray(noise(4, 6, 3)), "JPEG", exif=before))
    assert len(picture.exif) == len(before)
    assert sum(a != b for a, b in zip(picture.exif, before, strict=True)) <= 4
    assert read(encode(picture, "png")).exif == picture.exif
    assert read(encode(picture, "webp")).exif == picture.exif


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"\xff" * 40, b"MM\0\x81" + bytes(40), b"II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_is_dropped_and_the_picture_read(exif):
    values = noise(4, 6, 3)
    picture = read(saved(Image.fromarray(values), exif=b"Exif\0\0" + exif))
    assert picture.exif is None
    assert "unreadable EXIF dropped" in picture.notes
    np.testing.assert_array_equal(picture.pixels, values)


@pytest.mark.parametrize("format", [*LOSSLESS, "jpeg"])
def test_rgb_profile_and_resolution_are_kept(format):
    picture = read(saved(Image.fromarray(noise(4, 6, 3)), icc_profile=SRGB, dpi=(300, 150)))
    again = read(encode(picture, format))
    assert again.icc_profile == SRGB
    if format == "webp":
        assert again.dpi is None
    else:
        assert again.dpi == pytest.approx((300, 150), abs=0.02)


def test_a_grey_profile_stays_with_grey_only():
    grey = Picture(noise(4, 6, 1), icc_profile=GREY_PROFILE)
    assert read(encode(grey, "png")).icc_profile == GREY_PROFILE
    assert read(encode(grey, "tiff")).icc_profile == GREY_PROFILE
    assert read(encode(grey, "webp")).icc_profile is None
    rgb = Image.fromarray(noise(4, 6, 3))
    rgb.info["icc_profile"] = GREY_PROFILE
    picture = from_pil(rgb)
    assert picture.icc_profile is None
    assert "profile" in picture.notes[0]
    assert read(encode(Picture(noise(4, 6, 3), icc_profile=GREY_PROFILE), "png")).icc_profile is None


def test_jpeg_is_close_and_refuses_what_it_cannot_hold():
    ramp = np.repeat(np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[:, :, None], 3, axis=2)
    again = read(encode(Picture(ramp, exif=camera_exif()), "jpg", quality=95))
    assert np.abs(again.pixels.astype(int) - ramp).max() <= 6
    assert parsed(again.exif)[ExifTags.Base.Make] == "Maker"
    one_line_error(lambda: encode(Picture(ramp, alpha=ramp[:, :, 0]), "jpeg"), "transparency", ".png")
    one_line_error(lambda: encode(from_array(noise(2, 2, dtype=np.uint16)), "jpeg"), "16-bit", ".png")
    one_line_error(lambda: encode(Picture(ramp), "jpeg", quality=0), "quality", "1 to 100")


def test_webp_and_jpeg_refuse_sides_they_cannot_hold():
    one_line_error(lambda: encode(Picture(np.zeros((1, 65501, 3), np.uint8)), "jpeg"), "65500", ".png")
    one_line_error(lambda: encode(Picture(np.zeros((1, 16384, 3), np.uint8)), "webp"), "16383", ".png")


def test_the_format_is_the_argument_or_else_the_suffix(tmp_path):
    picture = Picture(noise(4, 6, 3))
    for suffix, kind in [(".PNG", "PNG"), (".tif", "TIFF"), (".webp", "WEBP"), (".jpeg", "JPEG")]:
        write(picture, tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.format == kind
    write(picture, tmp_path / "without_suffix", format="png")
    assert read(tmp_path / "without_suffix").pixels.shape == (4, 6, 3)
    one_line_error(lambda: write(picture, tmp_path / "a.bmp"), "a.bmp", ".png", ".webp", ".tiff", ".jpg")
    one_line_error(lambda: write(picture, tmp_path / "none"), "none", ".png")


# Files that are not one whole picture

CUT_SHORT = [
    ("PNG", {}),
    ("JPEG", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("WEBP", {"lossless": True}),
]
CUT_SHORT += [("BMP", {}), ("GIF", {})] + ([("AVIF", {})] if features.check("avif") else [])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("format", "options"), CUT_SHORT)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_file_cut_short_is_never_read_in_part(format, options, part, tmp_path):
    whole = saved(Image.fromarray(noise(64, 64, 3)), format, **options)
    assert read(whole).pixels.shape == (64, 64, 3)
    path = tmp_path / "cut short.img"
    path.write_bytes(whole[: int(len(whole) * part)])
    one_line_error(lambda: read(path), "cut short.img", "damaged or cut short", "again")


def test_a_damaged_png_is_refused():
    whole = bytearray(saved(Image.fromarray(noise(64, 64, 3))))
    whole[len(whole) // 2] ^= 0xFF
    one_line_error(lambda: read(bytes(whole)), "the image bytes", "damaged")


@pytest.mark.parametrize("part", [0.5, 1])
def test_a_program_that_loads_cut_files_gets_an_error_not_grey_pixels(monkeypatch, part):
    whole = saved(Image.fromarray(noise(64, 64, 3)), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    one_line_error(lambda: read(whole[: int(len(whole) * part)]), "LOAD_TRUNCATED_IMAGES", "False")


def test_missing_folder_empty_and_foreign_files(tmp_path):
    one_line_error(lambda: read(tmp_path / "none.png"), "none.png", "no such file")
    one_line_error(lambda: read(str(tmp_path)), str(tmp_path), "folder")
    (tmp_path / "empty.png").touch()
    one_line_error(lambda: read(tmp_path / "empty.png"), "empty.png", "empty")
    (tmp_path / "two\nlines.png").write_text("no picture")
    one_line_error(lambda: read(tmp_path / "two\nlines.png"), "not an image")
    one_line_error(lambda: read(b""), "empty")
    one_line_error(lambda: read(io.StringIO("text")), "str", "'rb'")
    one_line_error(lambda: read(np.zeros((4, 4))), "ndarray", "from_array")
    one_line_error(lambda: read("nul\0byte.png"), "cannot be read")
    if "HEIF" not in Image.OPEN:
        one_line_error(lambda: read(b"\0\0\0\x18ftypheic" + bytes(30)), "HEIC", "pillow-heif")


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    one_line_error(lambda: read(tmp_path / "locked.png"), "locked.png", "Permission denied", "permission")


def test_open_files_and_streams_are_read(tmp_path):
    values = noise(4, 6, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(read(file).pixels, values)
        one_line_error(lambda: read(file), "a.png", "seek(0)")
    np.testing.assert_array_equal(read(io.BytesIO((tmp_path / "a.png").read_bytes())).pixels, values)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_files_of_several_frames_are_refused(format):
    frames = [Image.fromarray(noise(8, 8, 3, seed=seed)) for seed in range(3)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    several = "more than one page" if format == "TIFF" else "3 frames"  # whose pages are not counted: that takes long
    one_line_error(lambda: read(data), several, "save the")
    one_line_error(lambda: from_pil(Image.open(io.BytesIO(data)), "page.x"), "page.x", "3 frames")


def test_the_first_picture_of_a_phone_mpo_is_used():
    frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (200, 20)]
    picture = read(saved(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert picture.notes == ("the first of 2 frames used",)
    assert (picture.pixels == 200).all()


def test_a_jpeg_of_endless_exif_is_refused_before_it_is_joined():
    data = saved(Image.fromarray(noise(6, 4, 3)), "JPEG")
    segment = b"\xff\xe1" + (2 + 8).to_bytes(2, "big") + b"Exif\0\0.."
    one_line_error(lambda: read(data[:2] + segment * 100 + data[2:]), "more than 64 pieces of EXIF", "export it again")


def tags_of_the_same_bytes(count, size):
    """A TIFF file's directory whose tags all point to the same bytes."""
    tags = [(tag, 7, size, 8) for tag in range(50_000, 50_000 + count)]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<L", 8 + size) + bytes(size) + struct.pack("<H", count) + entries + bytes(4)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF", "text"])
def test_metadata_that_unfolds_to_gigabytes_is_refused_before_it_is_read(format):
    bomb = b"Exif\0\0" + tags_of_the_same_bytes(2_000, 60_000 if format != "JPEG" else 30_000)
    image = Image.fromarray(noise(6, 4, 3))
    if format == "TIFF":
        data = bomb[6:]
    elif format == "JPEG":
        data = saved(image, "JPEG", exif=bomb)
        # What is no marker is passed over on the way to it, and padding is.
        data = data[:2] + b"\xff\xff\x01" + data[2:]
    elif format == "text":
        chunks = PngInfo()
        chunks.add_text("Raw profile type exif", f"\nexif\n {len(bomb)}\n{bomb.hex()}\n", zip=True)
        data = saved(image, "PNG", pnginfo=chunks)
    else:
        data = saved(image, format, exif=bomb)
    for upright in (True, False):
        one_line_error(lambda: read(data, upright=upright), "its tags say that they hold", "save")  # noqa: B023


def test_exif_that_begins_without_end_is_refused():
    for format in ("PNG", "WEBP"):
        data = saved(Image.fromarray(noise(6, 4, 3)), format, exif=b"Exif\0\0" * 300_000 + bytes(20))
        one_line_error(lambda: read(data), "begins again and again", "save")  # noqa: B023


def test_a_tile_larger_than_its_picture_counts():
    tags = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, 46_000), (323, 4, 1, 46_000), (324, 4, 1, 8), (325, 4, 1, 0)]  # fmt: skip
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    data = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)
    one_line_error(lambda: read(data), "a tile of the image bytes: 46000 x 46000 is more than", "make it smaller")


@pytest.mark.parametrize(("kind", "value"), [(3, 0), (4, 0), (9, 0), (13, 0), (16, 1)])
def test_directories_of_tags_are_found_however_their_place_is_written(kind, value):
    inner_at = 8 + 2 + 12 + 4 + 8
    inner = tags_of_the_same_bytes(2_000, 60_000)[8 + 60_000 :]
    place = struct.pack("<HH", inner_at, 0xFFFF) if kind == 3 else struct.pack("<L", 26 if value else inner_at)
    body = b"II*\0" + struct.pack("<L", 8) + struct.pack("<H", 1) + struct.pack("<HHL", 34665, kind, 1) + place
    body += bytes(4) + struct.pack("<Q", inner_at) + inner + bytes(60_000)
    assert "its tags say" in why_tags_are(body)
    picture = saved(Image.fromarray(noise(6, 4, 3)), "PNG", exif=b"Exif\0\0" + body)
    one_line_error(lambda: read(picture), "its tags say that they hold", "save")


def test_what_follows_a_jpeg_is_none_of_its_scans():
    data = saved(Image.fromarray(noise(16, 16, 3)), "JPEG", progressive=True)
    film = b"\xff\xda\0\x08" * 2_000  # as phones put one behind the photo
    assert read(data + film).width == 16


def test_text_that_is_no_exif_leaves_the_picture_whole():
    chunks = PngInfo()
    chunks.add_text("Raw profile type exif", "\nexif\n 4\nnot hex\n")
    picture = read(saved(Image.fromarray(noise(6, 4, 3)), "PNG", pnginfo=chunks))
    assert picture.pixels.size == 6 * 4 * 3
    assert "unreadable EXIF dropped" in picture.notes


def test_a_tiff_whose_next_page_is_itself_has_one():
    data = bytearray(saved(Image.fromarray(noise(6, 4, 3)), "TIFF"))
    (start,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<L", data, start + 2 + 12 * count, start)
    assert read(bytes(data)).pixels.shape[2] == 3


def test_a_jpeg_of_endless_scans_is_refused():
    data = saved(Image.fromarray(noise(16, 16, 3)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert read(data[:-2] + data[at:-2] * 100 + data[-2:]).width == 16
    one_line_error(lambda: read(data[:-2] + data[at:-2] * 300 + data[-2:]), "scans, each a pass", "as a PNG")


def test_a_name_as_long_as_a_picture_is_cut_in_messages():
    with pytest.raises(ImageFileError) as error:
        read("data:image/png;base64," + "A" * 10**6)
    assert len(str(error.value)) < 500


def test_a_decompression_bomb_is_refused_before_decoding():
    bomb = png(20_000, 20_000, 8, 2, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_line_error(lambda: read(bomb), "20000 x 20000", str(image_files.MAX_PIXELS), "smaller")
        one_line_error(lambda: read_mask(bomb), "20000 x 20000")


def test_a_webp_bomb_is_called_too_big_and_not_damaged(monkeypatch):
    data = saved(Image.fromarray(noise(30, 40, 3)), "WEBP")
    # Pillow's own limit stops its reader from version 13 on, ours whatever the version.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    one_line_error(lambda: read(data, max_pixels=10), "make it smaller")


def test_a_picture_without_pixels_is_refused():
    one_line_error(lambda: from_pil(Image.new("RGB", (0, 5)), "crop"), "crop", "0 x 5")
    one_line_error(lambda: read(png(0, 5, 8, 2, [])), "again")


@pytest.mark.parametrize("format", [*LOSSLESS, "tiff_lzw", "jpeg", "bmp", "gif"])
def test_no_warning_for_pictures_pillow_calls_big(format, monkeypatch):
    values = noise(30, 40, 3)
    format, _, compression = format.partition("_")
    data = saved(Image.fromarray(values), format, **({"compression": "tiff_lzw"} if compression else {}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read(data)
    assert picture.pixels.shape == (30, 40, 3)


def test_palette_and_grey_tiffs_are_read():
    values = noise(5, 6)
    palette = Image.fromarray(values, "P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for compression in (None, "tiff_lzw"):
        options = {"compression": compression}
        np.testing.assert_array_equal(read_mask(saved(palette, "TIFF", **options)), values)
        expected = np.array(palette.convert("RGB"))
        np.testing.assert_array_equal(read(saved(palette, "TIFF", **options)).pixels, expected)
        np.testing.assert_array_equal(read(saved(Image.fromarray(values), "TIFF", **options)).pixels[:, :, 0], values)


def test_many_threads_read_and_write_without_disturbing_each_other(tmp_path):
    failures, before = [], list(warnings.filters)

    def work(seed):
        try:
            picture = Picture(noise(50, 40, 3, seed=seed))
            for turn in range(5):
                for format in LOSSLESS:
                    written = write(picture, tmp_path / f"{seed}_{turn}.{format}")
                    assert np.array_equal(written.pixels, picture.pixels)
                write(picture, tmp_path / "shared.png")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before
    assert not list(tmp_path.glob(".*"))


# Masks


def test_masks_keep_their_label_values():
    labels = noise(5, 6) % 7
    palette = Image.fromarray(labels, "P")
    palette.putpalette(noise(768).tolist())
    np.testing.assert_array_equal(read_mask(saved(palette)), labels)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(labels))), labels)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(np.dstack([labels] * 3)))), labels)
    deep = noise(5, 6, dtype=np.uint16)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(deep))), deep)
    wide = deep.astype(np.int32) * 1000
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(wide), "TIFF")), wide)
    bits = read_mask(saved(Image.fromarray(labels > 3)))
    assert bits.dtype == np.bool_
    np.testing.assert_array_equal(bits, labels > 3)


def test_alpha_is_the_mask_only_when_it_alone_says_something():
    labels, alpha = noise(5, 6), noise(5, 6, seed=1)
    flat = np.zeros_like(labels)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(np.dstack([labels, alpha]), "LA"))), labels)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(np.dstack([flat, alpha]), "LA"))), alpha)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(np.dstack([flat, flat, flat, alpha])))), alpha)
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(np.dstack([flat, flat, flat, flat + 255])))), flat)
    coloured = np.dstack([flat + 255, flat, flat, alpha])
    np.testing.assert_array_equal(read_mask(saved(Image.fromarray(coloured))), alpha)


def test_masks_are_turned_upright_and_colours_refused(tmp_path):
    labels = noise(5, 6)
    data = saved(Image.fromarray(labels), exif=camera_exif(6))
    np.testing.assert_array_equal(read_mask(data), np.rot90(labels, -1))
    Image.fromarray(noise(5, 6, 3)).save(tmp_path / "colours.png")
    one_line_error(lambda: read_mask(tmp_path / "colours.png"), "colours.png", "label map")
    one_line_error(lambda: read_mask(saved(Image.fromarray(labels.astype(np.float32)), "TIFF")), "label map")
    one_line_error(lambda: read_mask(tmp_path / "none.png"), "none.png", "no such file")


# Putting the file in place


def test_a_failed_replace_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def refuse(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files.os, "replace", refuse)
    one_line_error(lambda: write(Picture(noise(4, 4, 3)), target), "a.png", "No space left on device")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(Picture(noise(4, 4, 3)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_read_back_alike_is_not_written(tmp_path, monkeypatch):
    wrong = encode(Picture(noise(4, 4, 3, seed=1)), "png")
    monkeypatch.setattr(image_files, "_encode", lambda *arguments: wrong)
    one_line_error(lambda: write(Picture(noise(4, 4, 3)), tmp_path / "a.png"), "a.png", "same pixels")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="file modes are a POSIX matter")
def test_modes_follow_the_umask_and_the_replaced_file(tmp_path):
    picture, target = Picture(noise(4, 4, 3)), tmp_path / "a.png"
    old = os.umask(0o027)
    try:
        write(picture, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o604)
        write(picture, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_folders_are_made_links_followed_and_bad_places_named(tmp_path):
    picture = Picture(noise(4, 4, 3))
    write(picture, str(tmp_path / "new" / "folder" / "a.png"))
    assert (tmp_path / "new" / "folder" / "a.png").is_file()
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write(picture, tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read(tmp_path / "real.png").pixels.shape == (4, 4, 3)
    (tmp_path / "folder.png").mkdir()
    one_line_error(lambda: write(picture, tmp_path / "folder.png"), "folder.png", "folder")
    one_line_error(lambda: write(picture, tmp_path / "real.png" / "a.png"), "a.png", "cannot be written")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_copy_says_which_of_its_files_cannot_be_read(tmp_path):
    one_line_error(
        lambda: copy_in_place(Path("/proc/self/mem"), tmp_path / "copy"), "/proc/self/mem", "cannot be read"
    )
    assert not list(tmp_path.iterdir())


def test_thumbnail_of_the_unprotected_photo_is_not_published():
    small = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(small, "JPEG")
    thumbnail = small.getvalue()
    # Little-endian TIFF: IFD0 with a maker (42 bytes in) and an orientation, then IFD1 that points at the thumbnail.
    ifd0 = struct.pack("<H", 2) + struct.pack("<HHL4s", 271, 2, 4, b"ACM\0") + struct.pack("<HHLHH", 274, 3, 1, 1, 0)
    ifd1_at = 8 + len(ifd0) + 4
    ifd1 = struct.pack("<H", 2) + struct.pack("<HHLL", 0x201, 4, 1, ifd1_at + 2 + 24 + 4)
    ifd1 += struct.pack("<HHLL", 0x202, 4, 1, len(thumbnail)) + struct.pack("<L", 0)
    body = b"II*\0" + struct.pack("<L", 8) + ifd0 + struct.pack("<L", ifd1_at) + ifd1 + thumbnail
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG", exif=b"Exif\0\0" + body)
    assert thumbnail in buffer.getvalue()
    # A length that is not there, or one that is too short, as some programs leave them.
    without = body.replace(struct.pack("<HHLL", 0x202, 4, 1, len(thumbnail)), struct.pack("<HHLL", 0x203, 4, 1, 9))
    cut = body.replace(struct.pack("<HHLL", 0x202, 4, 1, len(thumbnail)), struct.pack("<HHLL", 0x202, 4, 1, 0))
    third = body.replace(thumbnail, thumbnail[:2] + bytes(9))
    at = ifd1_at + 2 + 24  # where the next directory would be said to be
    third = third[:at] + struct.pack("<L", 8) + third[at + 4 :]
    pictures = [body + start for start in (b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8L")]
    for odd in (without, cut, third, *pictures):
        other = io.BytesIO()
        Image.new("RGB", (40, 30), "red").save(other, "JPEG", exif=b"Exif\0\0" + odd)
        picture = image_files.read(other.getvalue())
        assert picture.exif is None
        assert "unreadable EXIF dropped" in picture.notes

    picture = image_files.read(buffer.getvalue())
    assert any("thumbnail" in note for note in picture.notes)
    for format in ("png", "webp", "tiff", "jpeg"):
        published = image_files.encode(picture, format)
        assert thumbnail[100:] not in published
        assert Image.open(io.BytesIO(published)).getexif()[271] == "ACM"


@pytest.mark.parametrize(
    "name",
    [
        "\u0645\u06cc\u200c\u062e.png",  # Persian, with a joiner of no width
        "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
        "n\u0303 \u0928\u092e\u0938\u094d\u0924\u0947.png",
        "non\u00a0breaking.png",
        "\u5199\u771f.png",
    ],
)
def test_names_of_all_scripts_are_shown_as_they_are(name):
    assert image_files.printable(name) == name
    assert image_files.printable(f"\u202e{name}\u2028\x9b\udc80") == rf"\u202e{name}\u2028\x9b\udc80"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("number", "kind"), [("H", 3), ("L", 4)])
@pytest.mark.parametrize("strips", [1, 2, 3])
def test_thumbnails_of_strips_are_not_published(order, number, kind, strips):
    size, maker_at = 40, 8 + 2 + 12 + 4
    maker, strip = b"A camera maker\0", np.random.default_rng(0).bytes(size)
    ifd1_at = maker_at + len(maker)
    offsets_at = ifd1_at + 2 + 24 + 4
    strips_at = offsets_at + 2 * strips * struct.calcsize(order + number)
    offsets = [strips_at + size * index for index in range(strips)]

    def entry(tag, values, at):
        packed = struct.pack(f"{order}{strips}{number}", *values)
        inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "L", at)
        return struct.pack(order + "HHL", tag, kind, strips) + inline, packed

    entries = (
        entry(0x111, offsets, offsets_at),
        entry(0x117, [size] * strips, offsets_at + (strips_at - offsets_at) // 2),
    )
    body = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8)
    body += struct.pack(order + "HHHLL", 1, 271, 2, len(maker), maker_at) + struct.pack(order + "L", ifd1_at) + maker
    body += struct.pack(order + "H", 2) + b"".join(found for found, _ in entries) + struct.pack(order + "L", 0)
    body += b"".join(packed for _, packed in entries) + strip * strips
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG", exif=b"Exif\0\0" + body)
    assert buffer.getvalue().count(strip) == strips

    published = image_files.encode(image_files.read(buffer.getvalue()), "jpeg")
    assert strip[:8] not in published
    assert Image.open(io.BytesIO(published)).getexif()[271] == "A camera maker"


def test_copies_of_the_photo_in_other_tags_are_not_published(tmp_path):
    small = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(small, "JPEG")
    copy = small.getvalue()
    exif = Image.Exif()
    for tag in (700, 33723, 34377, 37724):
        exif[tag] = copy
    exif[271], exif[33432], exif[33922] = "ACM", "Ada", (1.0, 2.0, 3.0)
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.LensModel: "a lens"}
    pixels = Image.new("RGB", (40, 30), "red")
    for name in ("photo.tif", "photo.jpg", "photo.png"):
        pixels.save(tmp_path / name, exif=exif.tobytes())
        assert copy[100:] in (tmp_path / name).read_bytes()
        picture = image_files.read(tmp_path / name)
        for format in ("png", "webp", "tiff", "jpeg"):
            published = image_files.encode(picture, format)
            assert copy[100:] not in published
            kept = Image.open(io.BytesIO(published)).getexif()
            assert (kept[271], kept[33432]) == ("ACM", "Ada")
            assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] == "a lens"
            assert kept[33922] == (1.0, 2.0, 3.0)
            assert not {700, 33723, 34377, 37724} & set(kept)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_dpi_turns_with_the_picture(orientation):
    data = saved(Image.fromarray(noise(4, 6, 3)), "JPEG", dpi=(100, 200), exif=camera_exif(orientation))
    assert read(data).dpi == ((200, 100) if orientation >= 5 else (100, 200))


def test_a_transparent_value_of_four_bits():
    key = png_chunk(b"tRNS", struct.pack(">H", 2))
    four_bits = read(png(4, 1, 4, 0, [bytes([0x01, 0x2F])], key))
    np.testing.assert_array_equal(four_bits.pixels[0, :, 0], [0, 17, 34, 255])
    np.testing.assert_array_equal(four_bits.alpha, [[255, 255, 0, 255]])


def test_max_pixels_may_be_reached():
    data = saved(Image.fromarray(noise(30, 40, 3)))
    assert read(data, max_pixels=1200).width == 40
    one_line_error(lambda: read(data, max_pixels=1199), "more than 1199 pixels")


@pytest.mark.parametrize("first", [True, False])
def test_a_picture_before_or_after_maker_notes_drops_the_exif(first):
    exif, maker_note, hidden = 8 + 2 + 12 + 4, b"\xff\xd8\xff its own", b"\xff\xd8\xff" + bytes(40)
    at = exif + 2 + 12 + 4 + (len(hidden) if first else 0)
    body = b"II*\0" + struct.pack("<L", 8) + struct.pack("<HHHLL", 1, 0x8769, 4, 1, exif) + struct.pack("<L", 0)
    body += struct.pack("<HHHLL", 1, 0x927C, 7, len(maker_note), at) + struct.pack("<L", 0)
    rest = hidden + maker_note if first else maker_note + hidden
    small = Image.fromarray(noise(4, 6, 3))
    assert read(saved(small, "PNG", exif=b"Exif\0\0" + body + rest)).exif is None
    alone = struct.pack("<HHHLL", 1, 0x927C, 7, len(maker_note), exif + 18) + struct.pack("<L", 0) + maker_note
    assert maker_note in read(saved(small, "PNG", exif=b"Exif\0\0" + body[:exif] + alone)).exif
