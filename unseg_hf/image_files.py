"""Read and write photo files with nothing lost that matters: pixels, alpha, EXIF, ICC profile, resolution.

`read` (or `from_pil`, `from_array`) gives an upright `Picture`; `write` encodes it, decodes the result again,
compares, and only then puts the file in place. Everything that is wrong with a file is one `ImageFileError` line.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import struct
import unicodedata
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from .costly_files import EXIF_PREFIX, TYPE_SIZES, why_costly, why_tags_are

# Twice pillow's own default limit: where pillow turns its warning into an error.
MAX_PIXELS = 178_956_970
WEBP_MAX_SIDE, JPEG_MAX_SIDE = 16_383, 65_500

SUFFIXES: Mapping[str, str] = MappingProxyType(
    {".png": "png", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff", ".jpg": "jpeg", ".jpeg": "jpeg"}
)
READ_SUFFIXES = (*SUFFIXES, ".jpe", ".jfif", ".bmp", ".gif", ".avif", ".heic", ".heif")
"""Of files that folders are searched for; what they hold is told by how they begin."""
LOSSLESS_FORMATS: Mapping[str, str] = MappingProxyType({"png": ".png", "webp": ".webp", "tiff": ".tiff"})
LOSSY_FORMATS: Mapping[str, str] = MappingProxyType({"jpeg": ".jpg"})

# Noise leaves deflate few repetitions to find. Looking for none but runs of one byte takes half the time of pillow's
# usual search at level 4 (0.34 s for 0.58 s, 2000x1500 with noise of +-8) for files of the same size (3.22 MB for
# 3.26 MB; 1 % more where photos are small), and the level makes no difference then. The bytes of 16-bit grey come in
# pairs, which only a search finds: 23 % more without it.
PNG_COMPRESS_LEVEL = 4
# Noise is as hard for WebP: method 4 gives 489 kB in 0.17 s, method 6 with full effort 470 kB in 7 s.
WEBP_METHOD, WEBP_EFFORT = 4, 50
TIFF_STRIP_BYTES = 1 << 20
ARRAY_STRIP = 1 << 20  # pixels
MOST_EXIF = 64  # pieces of 64 kB
LONGEST_NAME = 300  # characters of it in messages

# A closed list: pillow also registers readers that start other programs (EPS) or hold no photos. HEIF is there
# only when the caller has registered pillow-heif.
_READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_JPEG_START = b"\xff\xd8\xff"
_PICTURES = (_JPEG_START, b"\x89PNG\r\n\x1a\n", b"WEBPVP8")
_ORIENTATION, _PHOTOMETRIC = int(ExifTags.Base.Orientation), int(ExifTags.Base.PhotometricInterpretation)
_EXIF_DIRECTORY, _MAKER_NOTE = int(ExifTags.Base.ExifOffset), int(ExifTags.Base.MakerNote)
_RESOLUTIONS = (int(ExifTags.Base.XResolution), int(ExifTags.Base.YResolution))
_WHOLE_NUMBERS = {3: "H", 4: "L", 13: "L"}  # of these types of values
# XMP, IPTC, Photoshop's two and Windows' thumbnail: previews, layers, and what is not carried over.
_COPIES = {700, 33723, 34377, 37724, 0x501B}
_SUB_IMAGES = 330
_TURNING = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
_TILE = (322, 323)  # its width and height
# Of what, by what and whose a photo is, its Exif and GPS directories, ratings, XP's texts, and where on earth it lies.
_DESCRIPTIVE = {
    269, 270, 271, 272, 285, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853, *range(40091, 40096),
    33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113,
}  # fmt: skip
# Tags of a thumbnail's first byte and number of bytes, as a JPEG file and as bare pixels in strips.
_JPEG_THUMBNAIL, _STRIP_THUMBNAIL = (0x0201, 0x0202), (0x0111, 0x0117)


class ImageFileError(ValueError):
    """One line: names the file, what is wrong, and the fix."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(name: Any) -> str:
    """The name of a file, or what was made of it, for a terminal, which would obey what some names hold."""
    return "".join(ascii(c)[1:-1] if _commands(c) else c for c in str(name))


def _commands(character: str) -> bool:
    """Control characters, ends of lines, and what turns the direction of writing; not what joins letters or emoji."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNING


def _error(name: str, problem: str, fix: str) -> ImageFileError:
    # A string may be a whole picture, in base64.
    name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    return ImageFileError(" ".join(f"{name}: {problem}; {fix}".splitlines()))


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright picture and what its file said about it. Treat the arrays as read-only.

    pixels: (height, width, channels); 1 channel (grey; uint8 in [0, 255] or uint16 in [0, 65535]) or 3 (RGB, uint8).
    alpha: (height, width) uint8 in [0, 255], 0 is transparent, not premultiplied; None when there is no transparency,
    and always None for uint16 pixels.
    exif: starts with b"Exif\\0\\0"; its orientation, when it has one, is 1. dpi: (horizontal, vertical) per inch.
    notes: what had to change when reading, in plain words. Raises ImageFileError for any other shape or dtype.
    """

    pixels: np.ndarray = field(repr=False)
    alpha: np.ndarray | None = field(default=None, repr=False)
    exif: bytes | None = field(default=None, repr=False)
    icc_profile: bytes | None = field(default=None, repr=False)
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if len(shape) != 3 or (shape[2], dtype) not in ((1, np.uint8), (3, np.uint8), (1, np.uint16)):
            fix = "give uint8 (height, width, 1 or 3) or uint16 (height, width, 1)"
            raise _error("the picture", f"pixels are {dtype} {shape}", fix)
        if 0 in shape:
            raise _error("the picture", f"it has no pixels, shape {shape}", "give at least 1 x 1")
        if self.alpha is None:
            return
        if self.alpha.shape != shape[:2] or self.alpha.dtype != np.uint8 or dtype != np.uint8:
            problem = f"alpha is {self.alpha.dtype} {self.alpha.shape} beside {dtype} pixels {shape}"
            raise _error("the picture", problem, "give 8-bit alpha of the same height and width, or none")

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def max_value(self) -> int:
        """255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)

    def with_pixels(self, pixels: np.ndarray) -> "Picture":
        """The same picture with other pixels; raises ImageFileError unless shape and dtype are the same."""
        if pixels.shape != self.pixels.shape or pixels.dtype != self.pixels.dtype:
            problem = f"they are {pixels.dtype} {pixels.shape}"
            raise _error("the new pixels", problem, f"give {self.pixels.dtype} {self.pixels.shape}")
        return replace(self, pixels=pixels)

    def to_pil(self) -> Image.Image:
        """A fresh image (L, LA, RGB, RGBA or I;16); .info carries icc_profile, exif and dpi where there are any."""
        planes = self.pixels if self.alpha is None else np.dstack([self.pixels, self.alpha])
        image = Image.fromarray(np.ascontiguousarray(planes[:, :, 0] if planes.shape[2] == 1 else planes))
        kept = {"icc_profile": self.icc_profile, "exif": self.exif, "dpi": self.dpi}
        image.info.update({key: value for key, value in kept.items() if value is not None})
        return image

    def rgb8(self) -> np.ndarray:
        """What a model looks at: a new (height, width, 3) uint8 array in [0, 255], alpha ignored."""
        pixels = self.pixels
        if pixels.dtype == np.uint16:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        # numpy's repeat takes ten times as long as a copy.
        return pixels.copy() if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def read(
    source: str | os.PathLike | bytes | BinaryIO, *, upright: bool = True, max_pixels: int = MAX_PIXELS
) -> Picture:
    """The picture in a file, in bytes, or in an open binary file (read from where it stands).

    upright: turned as its EXIF says; else as stored, for masks that were drawn so (not TIFF, which pillow turns).
    Raises ImageFileError for anything that is not one whole, undamaged picture of at most max_pixels pixels (and never
    more than MAX_PIXELS); a bigger one is refused by its header, before its pixels are decoded.
    """
    image, name = _open(source)
    _check_sizes(image, name, max_pixels)
    if upright:
        return from_pil(image, name)
    orientation = 1
    try:
        if image.format == "PNG":
            image.load()  # whose EXIF may come last
        _check_tags(image, name)
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation in range(2, 9):
            image.getexif()[_ORIENTATION] = 1
    except (ImageFileError, MemoryError):
        raise
    except Exception:
        pass  # EXIF that cannot be read turns nothing.
    picture = from_pil(image, name)
    if orientation in range(2, 9):
        return replace(picture, notes=(*picture.notes, f"left as stored: EXIF orientation {orientation} dropped"))
    return picture


def size_of(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """(height, width) of an image as stored, by its header; ImageFileError where it is none that is read here."""
    image, name = _open(source)
    _check_size(*image.size, name)
    return image.height, image.width


def from_pil(image: Image.Image, name: str = "the image") -> Picture:
    """The picture in a pillow image: upright, as grey or RGB, with alpha apart; `name` begins error messages.

    Raises ImageFileError for several frames, damaged data, and modes with no exact 8-bit or 16-bit grey form.
    """
    upright, raw_mode, orientation = _decode(image, name)
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"the first of {image.n_frames} frames used")
    if orientation > 1:
        notes.append(f"turned upright (EXIF orientation {orientation})")
    exif = _exif_of(image, notes)
    dpi = _dpi_of(image, sideways=orientation >= 5)
    if "gamma" in image.info and "icc_profile" not in image.info:
        notes.append("its gamma is not carried over: programs that heed it show other brightness")
    profile = upright.info.get("icc_profile") or None
    key = upright.info.get("transparency")
    mode = upright.mode

    if ";16" in raw_mode and not mode.startswith("I"):
        if key is not None:
            raise _error(name, "16-bit colour with one transparent colour", "save it with an alpha channel or 8 bits")
        notes.append("16-bit colour reduced to 8 bits")
        if raw_mode.startswith("LA"):
            # Pillow spreads 16-bit grey with alpha over RGBA; equal channels come back from LA unchanged.
            upright = upright.convert("LA")
    if mode.startswith("I") or mode == "F":
        if key is not None:
            raise _error(
                name, "16-bit grey with a transparent value", "remove the transparency or save it with 8 bits"
            )
        pixels = _grey16(upright, name)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            pixels = 65535 - pixels  # what is white is 0, which pillow heeds in 8 bits alone
        return Picture(pixels, None, exif, _matching_profile(profile, 1, notes), dpi, tuple(notes))

    if mode in ("P", "PA"):
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        notes.append("palette colours written out as RGB")
    elif mode == "1":
        upright = upright.convert("L")
        notes.append("black and white stored as 8-bit grey")
    elif mode in ("La", "RGBa"):
        upright = upright.convert(mode.upper())
    elif mode == "CMYK":
        upright, profile = _cmyk_to_srgb(upright, profile, notes), None
    elif mode in ("YCbCr", "LAB", "HSV", "RGBX"):
        upright = upright.convert("RGB")
        notes.append(f"{mode} converted to RGB")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        raise _error(name, f"pixels of kind {mode!r} are not read here", "convert it to 8-bit RGB and save it as PNG")
    if mode in ("La", "RGBa") or raw_mode.startswith(("La", "RGBa")):
        notes.append("premultiplied alpha undone, which rounds colours")

    planes = _planes_of(upright)
    alpha = None
    if planes.shape[2] in (2, 4):
        planes, alpha = np.ascontiguousarray(planes[:, :, :-1]), planes[:, :, -1].copy()
    elif mode in ("1", "L", "RGB") and isinstance(key, int | tuple):
        # Pillow stretches 2-bit and 4-bit grey to 8 bits but hands the key over as it stands in the file.
        step = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
        alpha = np.where((planes == np.array(key) * step).all(axis=2), 0, 255).astype(np.uint8)
        notes.append("the transparent colour became an alpha channel")
    profile = _matching_profile(profile, planes.shape[2], notes)
    return Picture(planes, alpha, exif, profile, dpi, tuple(notes))


def _planes_of(image: Image.Image) -> np.ndarray:
    """The (height, width, channels) pixels of an 8-bit image, as a new array."""
    planes = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    # In strips: on the way to an array pillow makes two more copies, of all pixels if they are asked for at once.
    rows = max(1, ARRAY_STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = Image.new(image.mode, (image.width, min(rows, image.height - top)), color=None)
        # Not image.crop, which warns of pictures that pillow calls big.
        strip.paste(image, (0, -top))
        planes[top : top + rows] = np.asarray(strip).reshape(strip.height, strip.width, -1)
    return planes


def from_array(array: Any, name: str = "the array") -> Picture:
    """The picture in a numpy array of shape (H, W), (H, W, 1), (H, W, 2: grey and alpha), (H, W, 3) or (H, W, 4).

    uint8; bool (False is 0, True is 255); floats, all in [0, 1] (times 255, rounded); or uint16 for (H, W) and
    (H, W, 1). Raises ImageFileError, naming shape, dtype or range, for anything else. The values are copied.
    """
    values = np.array(array)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 2, 3, 4) or 0 in values.shape:
        fix = "give (height, width) or (height, width, channels) with 1 to 4 channels, channels last"
        raise _error(name, f"shape {np.shape(array)} is not a picture", fix)
    _check_size(values.shape[1], values.shape[0], name)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    elif values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        # Written so that a NaN, which fails every comparison, is refused too.
        if not (low >= 0 and high <= 1):
            problem = f"{values.dtype} values run from {low:g} to {high:g}"
            raise _error(name, problem, "scale floats to [0, 1] with none missing, or give uint8 in [0, 255]")
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    elif values.dtype == np.dtype(np.uint16).newbyteorder():
        values = values.astype(np.uint16)
    if values.dtype not in (np.uint8, np.uint16) or (values.dtype == np.uint16 and values.shape[2] != 1):
        problem = f"{values.dtype} of shape {np.shape(array)} is not read"
        raise _error(name, problem, "give uint8 in [0, 255], floats in [0, 1], or uint16 grey")
    if values.shape[2] in (2, 4):
        return Picture(np.ascontiguousarray(values[:, :, :-1]), values[:, :, -1].copy())
    return Picture(values)


def read_mask(source: str | os.PathLike | bytes | BinaryIO | Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The (height, width) labels of a mask file or pillow image: bool for 1-bit files, else the integers it holds.

    Palette files give their indices, grey files their values, RGB files the value that the three channels share.
    A JPEG mask is read as bool, at half of its range: compression leaves values near 0 around every object.
    Alpha is ignored, unless the colour is the same everywhere and the alpha is not: then the alpha is the mask.
    Raises ImageFileError for colours and floats, and for what `read` refuses.
    """
    image, name = (source, "the mask") if isinstance(source, Image.Image) else _open(source, "the mask")
    _check_size(*image.size, name, max_pixels)
    labels = labels_of(*_decode(image, name)[:2], name)
    return labels >= 128 if image.format in ("JPEG", "MPO") else labels


def labels_of(upright: Image.Image, raw_mode: str, name: str) -> np.ndarray:
    """The (height, width) labels of a decoded mask, by the rules of `read_mask` but for JPEG; raw_mode is the file's.

    Raises ImageFileError for colours and floats.
    """
    values = np.array(upright)
    if upright.mode in ("1", "L", "P", "I"):
        return values
    if upright.mode.startswith("I;16"):
        return values.astype(np.uint16)
    if upright.mode == "PA":
        return values[:, :, 0].copy()
    if upright.mode in ("LA", "RGB", "RGBA") and ";16" not in raw_mode:
        colour, alpha = (values, None) if upright.mode == "RGB" else (values[:, :, :-1], values[:, :, -1])
        if alpha is not None and (colour == colour[0, 0]).all() and (alpha != alpha[0, 0]).any():
            return alpha.copy()
        if (colour == colour[:, :, :1]).all():
            return colour[:, :, 0].copy()
    problem = f"a mask of kind {upright.mode} with colours or fractions does not say which label a pixel has"
    raise _error(name, problem, "give a label map: a grey or palette PNG with one whole number for each label")


def encode(picture: Picture, format: str, quality: int = 95) -> bytes:
    """The picture as the bytes of a png, webp (lossless), tiff or jpeg file, with its EXIF, ICC profile and dpi.

    quality: 1 to 100, jpeg only. WebP holds neither grey (it becomes RGB, without its grey profile) nor dpi.
    Raises ImageFileError where the format cannot hold the picture.
    """
    return _encode(picture, _format_named(format, "the picture"), quality, "the picture")


def encode_verified(picture: Picture, format: str) -> bytes:
    """As `encode`, for a lossless format, after decoding the result again: it gives back equal pixels and alpha."""
    return _verified(picture, _format_named(format, "the picture"), 95, "the picture")[0]


def write(picture: Picture, path: str | os.PathLike, format: str | None = None, quality: int = 95) -> Picture:
    """Write the picture and return it as decoded back from what was written. The format defaults to the suffix's.

    The file appears whole or not at all; a failure leaves an existing one as it was. Missing folders are made.
    Formats other than jpeg are checked to give back equal pixels and alpha (no alpha equals alpha 255 everywhere,
    which WebP does not store; grey in WebP comes back as RGB). Raises ImageFileError.
    """
    target, name = Path(path), str(path)
    format = _format_named(SUFFIXES.get(target.suffix.lower(), target.suffix) if format is None else format, name)
    data, written = _verified(picture, format, quality, name)
    if format == "webp" and picture.pixels.shape[2] == 1:
        written = replace(written, notes=(*written.notes, "WebP has no grey: stored as RGB, without a grey profile"))
    put_in_place(data, target)
    return written


def _open(source: str | os.PathLike | bytes | BinaryIO, name: str = "the image bytes") -> tuple[Image.Image, str]:
    """The image, its header read and its pixels not yet, and the name it goes by in messages, a file's own."""
    try:
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
            data = Path(source).read_bytes()
        elif hasattr(source, "read"):
            name = str(getattr(source, "name", name))
            data = source.read()
        else:
            data = source
    except FileNotFoundError as error:
        raise _error(name, "there is no such file", "check the path") from error
    except IsADirectoryError as error:
        raise _error(name, "this is a folder", "give one image file in it") from error
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
        raise _error(name, problem, "check the path and your permission to read it") from error
    except ValueError as error:
        raise _error(name, f"it cannot be read ({error})", "give a path or an open binary file") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        fix = "give a path, bytes or a file opened with 'rb' (from_pil takes pillow images, from_array arrays)"
        raise _error(name, f"this holds {type(data).__name__}, not the bytes of an image file", fix)
    if len(data) == 0:
        raise _error(name, "it is empty", "export or download it again (an open file: seek(0) first)")
    return _identify(bytes(data), name), name


def _identify(data: bytes, name: str) -> Image.Image:
    # Not Image.open, which warns above 89 megapixels: silencing a warning changes the whole process and is not
    # thread-safe. Calling the same registered readers leaves the size to be judged by _check_size alone.
    Image.init()
    if data.startswith(_JPEG_START) and data.count(EXIF_PREFIX) > MOST_EXIF:
        # Pillow joins them, in a time that grows with the square of their number.
        raise _error(name, f"it has more than {MOST_EXIF} pieces of EXIF", "export it again")
    if why := why_costly(data):
        raise _error(name, why, "save the picture that you want as a PNG")
    damage: Exception | None = None
    for factory, accept in (Image.OPEN[kind] for kind in _READABLE if kind in Image.OPEN):
        accepted = accept is None or accept(data[:16])
        # A reader that is not built in answers with a sentence, which is true but no acceptance.
        if not accepted or isinstance(accepted, str):
            continue
        try:
            return factory(io.BytesIO(data), "")
        except MemoryError:
            raise
        except Image.DecompressionBombError as error:
            raise _error(name, f"it is too big ({error})", "make it smaller or crop it") from error
        except Exception as error:
            # Readers meet damaged headers with whatever their parsing raises: struct, index, key, syntax errors.
            damage = error
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and "HEIF" not in Image.OPEN:
        fix = "install pillow-heif and call pillow_heif.register_heif_opener() first, or export it as JPEG or PNG"
        raise _error(name, "this is a HEIC photo, which pillow cannot read by itself", fix)
    fix = "download or export it again, as PNG, JPEG, WebP or TIFF"
    if damage is not None:
        raise _error(name, f"it is damaged or cut short ({one_line(damage)})", fix) from damage
    raise _error(name, "this is not an image of a kind that is read here", fix)


def formats_of_data() -> list[str]:
    """Pillow's names of all formats but the one whose reader starts another program, for `Image.open(formats=...)`."""
    Image.init()
    return [kind for kind in Image.OPEN if kind != "EPS"]


def _check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1:
        raise _error(name, f"it has no pixels ({width} x {height})", "export it again")
    if width * height > max_pixels:
        raise _error(name, f"{width} x {height} is more than {max_pixels} pixels", "make it smaller or crop it")


def _check_sizes(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Of the picture, and of a TIFF file's tiles, each of which is decoded whole, however small the picture is."""
    _check_size(*image.size, name, max_pixels)
    tags = getattr(image, "tag_v2", {})
    if all(isinstance(tags.get(tag), int) for tag in _TILE):
        _check_size(*(tags[tag] for tag in _TILE), f"a tile of {name}", max_pixels)


def _check_tags(image: Image.Image, name: str) -> None:
    """Of EXIF that is not read yet."""
    exif = image.info.get("exif")
    if not exif and "Raw profile type exif" in image.info:
        with contextlib.suppress(ValueError):
            exif = _from_text(image.info["Raw profile type exif"])
    if isinstance(exif, bytes) and (why := why_tags_are(exif)):
        raise _error(name, why, "save it without EXIF")


def _from_text(profile: str) -> bytes:
    """EXIF that a PNG holds as text, in hexadecimal."""
    return bytes.fromhex("".join(profile.split("\n")[3:]))


def _decode(image: Image.Image, name: str) -> tuple[Image.Image, str, int]:
    """The whole upright image, the raw mode that its file says (or ""), and the EXIF orientation it had."""
    _check_sizes(image, name)
    tiles = getattr(image, "tile", None) or []
    if tiles and ImageFile.LOAD_TRUNCATED_IMAGES:
        problem = "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so a damaged file would be read as partly grey"
        raise _error(name, problem, "set it to False in this program")
    arguments = tiles[0][3] if tiles else ""
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise _error(name, f"it has {frames} frames or pages", "save the one you want as a PNG")
        # Pillow turns TIFF files while it loads them and then forgets how they stood.
        orientation = getattr(image, "tag_v2", {}).get(_ORIENTATION, 1)
        if tiles and image.format == "TIFF":
            # Made here because pillow warns of big pictures, for TIFF only, when it makes this itself.
            image.im = Image.new(image.mode, (image.tag_v2[256], image.tag_v2[257])).im
        image.load()
        _check_tags(image, name)
    except (ImageFileError, MemoryError):
        raise
    except Exception as error:
        # Each format's decoder has its own errors, and a damaged file can raise any of them.
        problem = f"its pixels are damaged or cut short ({one_line(error)})"
        raise _error(name, problem, "download or export it again") from error
    try:
        orientation = image.getexif().get(_ORIENTATION, orientation)
        if orientation not in range(2, 9):
            return image, raw_mode, 1
        return ImageOps.exif_transpose(image), raw_mode, orientation
    except MemoryError:
        raise
    except Exception:
        # EXIF is written by anything and breaks in any way; the pixels are whole, so the picture is usable.
        return image, raw_mode, 1


def _exif_of(image: Image.Image, notes: list[str]) -> bytes | None:
    raw = image.info.get("exif")
    try:
        if not raw and "Raw profile type exif" in image.info:
            raw = _from_text(image.info["Raw profile type exif"])
        if raw:
            return _publishable(raw, notes)
        kept = _descriptive(image.getexif())
        return kept.tobytes() if len(kept) else None
    except MemoryError:
        raise
    except Exception:
        notes.append("unreadable EXIF dropped")
        return None


def _publishable(exif: bytes, notes: list[str]) -> bytes:
    """EXIF with orientation 1 and no thumbnail, which would publish a small copy of the unprotected photo."""
    # Changed in place: writing EXIF anew through pillow loses maker notes and non-ASCII text.
    while exif.startswith(EXIF_PREFIX):
        exif = exif[len(EXIF_PREFIX) :]
    body = bytearray(exif)
    order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(body[:4])]

    def directory(start: int) -> tuple[dict[int, int], int]:
        """Where the value of each tag stands, and where the offset of the next directory does."""
        (count,) = struct.unpack_from(order + "H", body, start)
        end = start + 2 + 12 * count
        entries = range(start + 2, end, 12)
        return {struct.unpack_from(order + "H", body, entry)[0]: entry + 8 for entry in entries}, end

    def extent(value: int) -> tuple[int, int]:
        """Where what a tag holds begins, and its bytes; of more than four the value is their offset."""
        kind, count = struct.unpack_from(order + "HL", body, value - 6)
        size = TYPE_SIZES.get(kind, 8) * count
        return (value if size <= 4 else struct.unpack_from(order + "L", body, value)[0]), size

    def numbers(value: int) -> tuple[int, ...]:
        """A tag's whole numbers."""
        kind, count = struct.unpack_from(order + "HL", body, value - 6)
        return struct.unpack_from(f"{order}{count}{_WHOLE_NUMBERS[kind]}", body, extent(value)[0])

    def blank(at: int, size: int) -> None:
        body[at : at + size] = bytes(len(body[at : at + size]))

    (start,) = struct.unpack_from(order + "L", body, 4)
    first, end = directory(start)
    if _SUB_IMAGES in first:
        raise ValueError("images of their own, whose data may lie anywhere")
    if copies := _COPIES & first.keys():
        for tag in copies:
            blank(*extent(first[tag]))
        kept = [body[at - 8 : at + 4] for tag, at in first.items() if tag not in copies]
        shorter = struct.pack(order + "H", len(kept)) + b"".join(kept) + body[end : end + 4]
        body[start : end + 4] = shorter.ljust(len(body[start : end + 4]), b"\0")
        first, end = directory(start)
    if _ORIENTATION in first:
        struct.pack_into(order + "HLHH", body, first[_ORIENTATION] - 6, 3, 1, 1, 0)
    (second,) = struct.unpack_from(order + "L", body, end) if end + 4 <= len(body) else (0,)
    if second:
        thumbnail, after = directory(second)
        if any(body[after : after + 4]):
            raise ValueError("a third directory, of what nobody knows")
        struct.pack_into(order + "L", body, end, 0)
        for start, length in (_JPEG_THUMBNAIL, _STRIP_THUMBNAIL):
            if start in thumbnail and length in thumbnail:
                # One piece, or several strips.
                for offset, size in zip(numbers(thumbnail[start]), numbers(thumbnail[length]), strict=True):
                    blank(offset, size)
        notes.append("the thumbnail in the EXIF removed: it shows the photo without noise")
    maker_notes = slice(0, 0)
    if _EXIF_DIRECTORY in first and _MAKER_NOTE in (inner := directory(numbers(first[_EXIF_DIRECTORY])[0])[0]):
        at, size = extent(inner[_MAKER_NOTE])
        maker_notes = slice(at, at + size)
    around = body[: maker_notes.start], body[maker_notes.stop :]
    if any(picture in part for picture in _PICTURES for part in around):
        raise ValueError("a picture somewhere in it that is not where thumbnails are")
    return EXIF_PREFIX + bytes(body)


def _descriptive(exif: Image.Exif) -> Image.Exif:
    """The tags that describe the photo, without those that say how a TIFF file stores it (both share one list)."""

    def exact(values: Mapping[int, Any]) -> dict[int, Any]:
        # Pillow reads text as Latin-1 but writes it as ASCII with question marks.
        return {k: v.encode("latin-1") if isinstance(v, str) and not v.isascii() else v for k, v in values.items()}

    kept = Image.Exif()
    for tag, value in exact({tag: exif[tag] for tag in exif if tag in _DESCRIPTIVE}).items():
        kept[tag] = value
    for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if tag in kept:
            kept[tag] = exact(exif.get_ifd(tag))
            if ExifTags.IFD.Interop in kept[tag]:
                kept[tag][ExifTags.IFD.Interop] = exact(exif.get_ifd(ExifTags.IFD.Interop))
    return kept


def _dpi_of(image: Image.Image, sideways: bool) -> tuple[float, float] | None:
    if image.format == "TIFF" and not all(tag in getattr(image, "tag_v2", {}) for tag in _RESOLUTIONS):
        return None  # pillow says 1
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and value > 0 for value in (across, down)):
        return None
    return (down, across) if sideways else (across, down)


def _matching_profile(profile: bytes | None, channels: int, notes: list[str]) -> bytes | None:
    if profile and profile[16:20] != (b"GRAY" if channels == 1 else b"RGB "):
        notes.append("colour profile of another kind of image dropped")
        return None
    return profile


def as_rgb8(image: Image.Image) -> Image.Image:
    """A pillow image as 8-bit RGB, alpha ignored: as pillow converts it, but for 16-bit grey, which it would clip.

    Raises ImageFileError for numbers that are no 16-bit grey.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(from_pil(image).rgb8())
    return image.convert("RGB")


def _grey16(image: Image.Image, name: str) -> np.ndarray:
    values = np.array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        problem = f"its {image.mode!r} pixels run from {values.min():g} to {values.max():g}"
        raise _error(name, problem, "scale them to whole numbers in [0, 65535] or [0, 255] and save it as PNG")
    return values.astype(np.uint16)[:, :, None]


def _cmyk_to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    if profile:
        # Imported here because few photos are CMYK and colour management is slow to load.
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, ImportError, OSError, ValueError):
            pass
        else:
            notes.append("CMYK converted to sRGB by its colour profile")
            return converted
    notes.append("CMYK converted to sRGB without a usable colour profile, so colours are approximate")
    return image.convert("RGB")


def _format_named(format: str, name: str) -> str:
    found = SUFFIXES.get("." + format.lower().removeprefix("."))
    if found is None:
        supported = ", ".join(SUFFIXES)
        raise _error(name, f"files of kind {format!r} are not written here", f"use one of {supported}")
    return found


def _encode(picture: Picture, format: str, quality: int, name: str) -> bytes:
    deep = picture.max_value > 255
    if format == "webp" and (deep or max(picture.height, picture.width) > WEBP_MAX_SIDE):
        what = "16-bit grey" if deep else f"a side above {WEBP_MAX_SIDE} pixels"
        raise _error(name, f"WebP cannot hold {what}", "use .png or .tiff")
    if format == "jpeg" and max(picture.height, picture.width) > JPEG_MAX_SIDE:
        raise _error(name, f"JPEG cannot hold a side above {JPEG_MAX_SIDE} pixels", "use .png or .tiff")
    if format == "jpeg" and (deep or picture.alpha is not None):
        what = "16-bit grey" if deep else "transparency"
        raise _error(name, f"JPEG cannot hold {what}", "use .png" if deep else "use .png or .webp")
    if format == "jpeg" and quality not in range(1, 101):
        raise _error(name, f"quality {quality!r} is not a JPEG quality", "give a whole number from 1 to 100")
    channels = 3 if format == "webp" else picture.pixels.shape[2]
    profile = _matching_profile(picture.icc_profile, channels, [])
    options: dict[str, Any] = {
        "png": {
            "compress_level": PNG_COMPRESS_LEVEL,
            "compress_type": zlib.Z_DEFAULT_STRATEGY if deep else zlib.Z_RLE,
        },
        "webp": {"lossless": True, "exact": True, "method": WEBP_METHOD, "quality": WEBP_EFFORT},
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "tiff": {},
    }[format]
    kept = {"icc_profile": profile, "dpi": None if format == "webp" else picture.dpi}
    options |= {key: value for key, value in kept.items() if value}
    image = picture.to_pil()
    # Savers fall back to what the image carries, which would bring a profile that does not match back in.
    image.info.clear()
    buffer = io.BytesIO()
    try:
        if format == "tiff":
            return _tiff(picture, profile)
        if picture.exif:
            options["exif"] = _publishable(picture.exif, [])
        image.save(buffer, format=format.upper(), **options)
    except MemoryError:
        raise
    except Exception as error:
        # Mostly EXIF: too long for JPEG, or made by hand and broken, which any error of its parsing can say.
        problem = f"{format} cannot hold this picture ({one_line(error)})"
        raise _error(name, problem, "leave its EXIF out or use .png") from error
    return buffer.getvalue()


def _verified(picture: Picture, format: str, quality: int, name: str) -> tuple[bytes, Picture]:
    """The encoded picture, and the picture that it decodes to."""
    data = _encode(picture, format, quality, name)
    written = from_pil(_open(data)[0], name)
    if format in LOSSLESS_FORMATS and not _same(picture, written):
        raise _error(name, f"the {format} file does not give back the same pixels", "report this; try another format")
    return data, written


def _tiff(picture: Picture, profile: bytes | None) -> bytes:
    # Not pillow's own writer: with compression it goes through libtiff, which loses the camera and GPS parts of
    # EXIF and turns non-ASCII text into question marks.
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    planes = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    height, width, samples = planes.shape
    little_endian = planes.astype(planes.dtype.newbyteorder("<"))
    # Differences of neighbours (TIFF predictor 2), which wrap around, take a fifth less room.
    little_endian[:, 1:] -= planes[:, :-1]
    rows = max(1, TIFF_STRIP_BYTES // (width * samples * planes.itemsize))
    strips = [zlib.compress(little_endian[top : top + rows].tobytes()) for top in range(0, height, rows)]
    offsets = np.cumsum([0] + [len(strip) for strip in strips[:-1]]).tolist()

    directory = ImageFileDirectory_v2()
    if picture.exif:
        exif = Image.Exif()
        exif.load(picture.exif)
        for tag, value in _descriptive(exif).items():
            directory[tag] = value
    # 8 is deflate; photometric 1 is grey with black at 0, 2 is RGB; extra sample 2 is alpha that is not premultiplied.
    structure = {256: width, 257: height, 258: (8 * planes.itemsize,) * samples, 259: 8}
    structure |= {262: 2 if picture.pixels.shape[2] == 3 else 1, 273: tuple(offsets), 277: samples, 278: rows}
    structure |= {279: tuple(len(strip) for strip in strips), 284: 1, 317: 2}
    structure |= {338: 2} if picture.alpha is not None else {}
    structure |= {282: picture.dpi[0], 283: picture.dpi[1], 296: 2} if picture.dpi else {}
    structure |= {34675: profile} if profile else {}
    for tag, value in structure.items():
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    buffer.writelines(strips)
    return buffer.getvalue()


def _same(picture: Picture, written: Picture) -> bool:
    shape = picture.pixels.shape
    grey_became_rgb = shape[2] == 1 and written.pixels.shape == (*shape[:2], 3)
    if picture.pixels.dtype != written.pixels.dtype or not (written.pixels.shape == shape or grey_became_rgb):
        return False
    # Row by row: what a comparison of all pixels at once says takes as much memory as they do.
    if any((one != other).any() for one, other in zip(picture.pixels, written.pixels, strict=True)):
        return False
    alphas = [np.uint8(255) if alpha is None else alpha for alpha in (picture.alpha, written.alpha)]
    return bool((alphas[0] == alphas[1]).all())


def put_in_place(data: bytes, target: Path) -> None:
    """Write a file, whole or not at all; ImageFileError where it cannot be written."""
    with replacing(target) as file:
        file.write(data)


def sha256_of(path: str | os.PathLike) -> str:
    """Of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_in_place(source: Path, target: Path) -> str:
    """Copy a file of any kind and size, whole or not at all; returns its sha256. Raises OSError, ImageFileError."""
    digest = hashlib.sha256()
    with open(source, "rb") as original, replacing(target) as file:

        def read() -> bytes:
            try:
                return original.read(1 << 20)
            except OSError as error:
                problem = f"it cannot be read ({error.strerror or error})"
                raise _error(str(source), problem, "check the disk it is on") from error

        while data := read():
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def leftovers(folder: Path) -> Iterator[Path]:
    """Half-written files below a folder that a killed process has left."""
    return (path for path in folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name))


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """An open file that becomes `target` when all was written; ImageFileError where it cannot be."""
    # Through links, so that a linked file is replaced and not the link.
    name, target = str(target), Path(os.path.realpath(target))
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        try:
            # Plain open, not tempfile: the mode of a new file should follow the umask.
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        problem = f"it cannot be written ({error.strerror or error})"
        raise _error(name, problem, "check the path, your permissions and the free space") from error
