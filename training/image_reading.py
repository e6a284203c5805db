"""Reader of image files: the only place where images that users provide are decoded.

Training sets, targets of an inversion, prompts of flow generators and the previews on label pages use the
function `read_image`, so that people and generators see the same pixels:

- The orientation in the EXIF data is applied, so the image is upright.
- 16-bit greyscale is scaled to 8 bits. Palette, CMYK and 1-bit images are converted to RGB or greyscale.
- A transparent image is composited on a background, or keeps its alpha channel.
- An image with more than MAX_PIXELS pixels is reduced while a JPEG file is decoded. Other formats cannot be
  reduced while they are decoded, so such a file is rejected before it is decoded.

An 8-bit RGB or greyscale image without transparency and without orientation is decoded bitwise as it is
stored.

`split_names` sorts the files of a folder by their names into images and files that are not read, and
`skipped_lines` describes the latter with a remedy for each kind, so that no file is left out unnoticed.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps

# File name suffixes of images, in lower case.
IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".gif",
)
# Pillow's names of these formats. Other decoders of Pillow are not used, because they read formats that a
# file with one of these suffixes should not have. The decoder of JPEG also reads MPO, which is a JPEG file
# with further images, such as depth maps of phones.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
# Largest number of pixels of a decoded image. With it, reading needs less than 1 GB of memory.
MAX_PIXELS = 50_000_000
# Largest number of bytes for the coefficients of a progressive JPEG file, which the decoder holds for the
# complete image even if the image is reduced while it is decoded.
_MAX_COEFFICIENT_BYTES = 600_000_000
# First bytes of PNG, JPEG, GIF, TIFF and BigTIFF files. BMP files are left out, because their first two bytes
# may begin other files.
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Brands of HEIF files, which state the codec. They follow the length and the word "ftyp". Phones often write
# HEIC images with the suffix .jpg.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# Alpha modes of Pillow. Modes that end in a small letter have colours that are multiplied by alpha.
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# Errors that Pillow's decoders raise for damaged files.
_DECODER_ERRORS = (
    ArithmeticError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# Values of the field NewSubfileType of a TIFF page that is a reduced copy (bit 0) or a mask (bit 2) of
# another page.
_SUBFILE_TYPE = 254
_REDUCED_OR_MASK = 1 | 4
_ORIENTATION = 274  # EXIF field
_PHOTOMETRIC = 262  # TIFF field; its value 0 means that 0 is white
_pillow_lock = threading.Lock()

Background = Literal["white", "black"]


class UnusableImageError(ValueError):
    """Error for an intact image file of a kind that is not read: HEIC, animated, or too large.

    In a folder, such files are skipped and listed. A damaged file is a plain ValueError.
    """


def read_image(
    source: Path | bytes | memoryview,
    name: str,
    *,
    background: Background | None = "white",
    needed_size: tuple[int, int] | None = None,
) -> PIL.Image.Image:
    """Read an image file as people see it: upright, with 8 bits per channel.

    Args:
        source: path of the file, or its bytes.
        name: description of the file, with which messages begin.
        background: colour on which transparent images are composited. None keeps the alpha channel.
        needed_size: width and height in pixels that suffice for the caller. A JPEG file may then be decoded
            at a reduced size, which is at least this large. None: full size, unless the image has more than
            MAX_PIXELS pixels.
    Returns: image in the mode L or RGB; without a background, also LA or RGBA if it is transparent.
    Raises: UnusableImageError for an image of a kind that is not read; ValueError for a damaged file and for
        a file that is no image. The message is one line that contains a remedy.
    """
    file = io.BytesIO(source) if isinstance(source, bytes | memoryview) else source
    with _described_errors(file, name), _opened(file) as image:
        _check_kind(image, name)
        _reduce_while_decoding(image, name, needed_size)
        return _upright_bytes(image, name, background)


_GREY_MODES = ("1", "L", "LA", "La")  # Pillow's greyscale modes of 8 bits and less, with and without alpha


def check_header(file: Path | IO[bytes], name: str) -> bool:
    """Raise the errors of `read_image` that can be found without decoding the pixels.

    Returns: True if `read_image` returns a greyscale image.

    Args:
        file: path of the file, or the file opened for reading.
        name: description of the file, with which messages begin.
    """
    with _described_errors(file, name), _opened(file) as image:
        _check_kind(image, name)
        _reduce_while_decoding(image, name, None)
        return image.mode in _GREY_MODES or image.mode.startswith("I")


@contextmanager
def _described_errors(file: Path | IO[bytes], name: str) -> Iterator[None]:
    """Replace errors of the decoders by errors of one line with the name of the file and a remedy.

    Args:
        file: path of the file, or the file opened for reading.
        name: description of the file.
    Raises: UnusableImageError or ValueError, see `read_image`.
    """
    try:
        yield
    except (UnusableImageError, _CompleteError):
        raise
    except FileNotFoundError:
        raise ValueError(f"{name}: the file does not exist. Check the path.") from None
    except MemoryError:
        raise UnusableImageError(
            f"{name}: there is not enough memory to decode the image. Reduce its size, and save it as PNG."
        ) from None
    except PIL.UnidentifiedImageError:
        raise _unidentified(file, name) from None
    except _DECODER_ERRORS as error:
        error_text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name}: the image is incomplete or damaged ({error_text}; the file has {_byte_count(file)}"
            " bytes). Copy or export the file again, or remove it."
        ) from None


def _byte_count(file: Path | IO[bytes]) -> int:
    """Return the size of a file in bytes."""
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)


def looks_like_image(first_bytes: bytes) -> bool:
    """Return True if a file begins as an image of a format that is read, or as a HEIC image.

    Args: first_bytes: first 16 bytes of the file, or more.
    """
    return (
        first_bytes.startswith(_SIGNATURES)
        or (first_bytes[:4] == b"RIFF" and first_bytes[8:12] == b"WEBP")
        or (first_bytes[4:8] == b"ftyp" and first_bytes[8:12] in (*_AVIF_BRANDS, *_HEIC_BRANDS))
    )


def _is_readable(first_bytes: bytes) -> bool:
    """Return True if a file begins as an image of a format that is read."""
    return looks_like_image(first_bytes) and first_bytes[8:12] not in _HEIC_BRANDS


def upright_size(path: Path) -> tuple[int, int]:
    """Return the width and height in pixels that an image file has if it is upright and not reduced."""
    with _described_errors(path, str(path)), _opened(path) as image:
        width, height = image.size
        # Pillow exchanges the sides of TIFF images itself.
        is_on_side = image.format != "TIFF" and stored_orientation(path) >= 5
        return (height, width) if is_on_side else (width, height)


def stored_orientation(path: Path) -> int:
    """Return the orientation of an image file, which `read_image` applies: 1 for upright, else 2 to 8."""
    with _described_errors(path, str(path)), _opened(path) as image:
        try:
            return int(image.getexif().get(_ORIENTATION, 1))
        except _DECODER_ERRORS:
            return 1  # `read_image` ignores a damaged EXIF block, too


class _CompleteError(ValueError):
    """Error about an intact image whose values are not understood. Its message is complete."""


@contextmanager
def _opened(file: Path | IO[bytes]) -> Iterator[PIL.Image.Image]:
    """Open an image file without decoding it, and close it at the end."""
    # Pillow warns about images with many pixels, and rejects those with twice as many. Here, the number is
    # checked by `_reduce_while_decoding`, which can read larger JPEG files. Pillow's limit is a global
    # variable, so that it is restored after the header has been read.
    with ExitStack() as stack:
        # Pillow gets no path. It would map an uncompressed file into memory, and, in version 13, with the
        # wrong row length if the file is a TIFF image that lies on its side.
        opened_file = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        stack.enter_context(warnings.catch_warnings())
        # Pillow also warns about damaged metadata, which is not used.
        warnings.simplefilter("ignore", UserWarning)
        with _pillow_lock:
            pixel_limit = PIL.Image.MAX_IMAGE_PIXELS
            PIL.Image.MAX_IMAGE_PIXELS = None
            try:
                image = PIL.Image.open(opened_file, formats=_FORMATS)
            finally:
                PIL.Image.MAX_IMAGE_PIXELS = pixel_limit
        with image:
            yield image


def _check_kind(image: PIL.Image.Image, name: str) -> None:
    """Raise UnusableImageError for an animation and for a file with several pages.

    Args:
        image: image that has been opened, but not decoded.
        name: description of the file, for the message.
    """
    # The further images of an MPO file, which phones write, are other views or depth maps of the first one.
    frame_count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frame_count == 1:
        return
    if image.format == "TIFF":
        # Some programs store a reduced copy or a mask as a further page.
        page_count = 0
        for frame_index in range(frame_count):
            image.seek(frame_index)
            subfile_type = int(getattr(image, "tag_v2", {}).get(_SUBFILE_TYPE, 0))
            page_count += not subfile_type & _REDUCED_OR_MASK
        image.seek(0)
        if page_count > 1:
            raise UnusableImageError(
                f"{name}: the TIFF file has {page_count} pages, but an image must have one. Save the page as"
                " a PNG file."
            )
        return
    raise UnusableImageError(
        f"{name}: the file is an animation of {frame_count} frames, but an image must have one. Save one"
        " frame as a PNG file."
    )


def _reduce_while_decoding(image: PIL.Image.Image, name: str, needed_size: tuple[int, int] | None) -> None:
    """Make the decoder of a JPEG file reduce the image, if it is too large or larger than needed.

    Args:
        image: image that has been opened, but not decoded.
        name: description of the file, for the message.
        needed_size: see `read_image`.
    Raises: UnusableImageError if the image has more than MAX_PIXELS pixels and cannot be reduced.
    """
    width, height = image.size
    stored_size = image.size
    if image.format in ("JPEG", "MPO"):
        reduced_size = needed_size
        if width * height > MAX_PIXELS:
            # The decoder can divide the width and the height by 2, 4 or 8.
            divisor = next(
                (
                    divisor
                    for divisor in (2, 4, 8)
                    if -(-width // divisor) * -(-height // divisor) <= MAX_PIXELS
                ),
                8,
            )
            largest_size = (width // divisor, height // divisor)
            reduced_size = min(needed_size or largest_size, largest_size)
            # A progressive file has coefficients of two bytes for each sample of each component; components
            # of colour may have fewer samples than the brightness.
            sampling_factors = [
                (component[1], component[2]) for component in getattr(image, "layer", ())
            ] or [(1, 1)] * 4
            samples_per_pixel = sum(h * v for h, v in sampling_factors) / max(
                h * v for h, v in sampling_factors
            )
            if (
                image.info.get("progressive")
                and 2 * samples_per_pixel * width * height > _MAX_COEFFICIENT_BYTES
            ):
                raise _too_large(name, stored_size)
        if reduced_size is not None:
            image.draft(None, reduced_size)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, stored_size)


def _too_large(name: str, size: tuple[int, int]) -> UnusableImageError:
    """Return the error for an image that cannot be reduced while it is decoded.

    Args:
        name: description of the file.
        size: width and height of the image in pixels.
    """
    return UnusableImageError(
        f"{name}: the image has {size[0]} x {size[1]} pixels, but at most {MAX_PIXELS // 10**6} megapixels"
        " are decoded. Reduce the image, or save it as a baseline JPEG file if it needs no transparency."
    )


def _unidentified(file: Path | IO[bytes], name: str) -> ValueError:
    """Return the error for a file that none of the decoders recognises.

    Args:
        file: path of the file, or the file opened for reading.
        name: description of the file.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened_file:
            first_bytes = opened_file.read(64)
    else:
        file.seek(0)
        first_bytes = file.read(64)
    if first_bytes[4:8] == b"ftyp" and first_bytes[8:12] in _AVIF_BRANDS:
        return UnusableImageError(
            f"{name}: this installation of Pillow cannot read AVIF images. Update Pillow to 11.3 or later, or"
            " convert the image to PNG."
        )
    if first_bytes[4:8] == b"ftyp" and first_bytes[8:12] in _HEIC_BRANDS:
        return UnusableImageError(f"{name}: the file is a HEIC image. {_REMEDY_BY_KIND[_HEIC]}")
    # Files of metadata on other than Apple's disks begin with this number.
    if first_bytes[:4] == b"\x00\x05\x16\x07":
        return UnusableImageError(
            f"{name}: the file contains metadata of macOS and no image. {_REMEDY_BY_KIND[_METADATA]}"
        )
    if not first_bytes:
        return ValueError(f"{name}: the file is empty. Copy or export it again, or remove it.")
    return ValueError(
        f"{name}: the file of {_byte_count(file)} bytes is not an image in a supported format, or it is"
        " damaged. Export it again as PNG or JPEG, or remove it."
    )


def _upright_bytes(image: PIL.Image.Image, name: str, background: Background | None) -> PIL.Image.Image:
    """Decode an opened image, turn it upright, and convert it to 8 bits per channel.

    The arguments, the result and the errors are those of `read_image`.
    """
    image.load()
    tiff_tags = getattr(image, "tag_v2", {})  # empty for other formats
    decoded_image = _eight_bit(image, name, tiff_tags.get(_PHOTOMETRIC) == 0)
    try:
        # The orientation is read from `info`, which conversions keep. The image is changed in place, so
        # that no copy is made if it is upright already.
        PIL.ImageOps.exif_transpose(decoded_image, in_place=True)
    except _DECODER_ERRORS:
        # A damaged EXIF block states no orientation; the pixels are intact.
        pass
    if decoded_image.mode in ("LA", "RGBA") and background is not None:
        # Greyscale stays greyscale. `paste` blends with alpha as the weight of the image.
        canvas = PIL.Image.new(decoded_image.mode[:-1], decoded_image.size, background)
        if decoded_image.mode == "LA":
            canvas.paste(decoded_image.getchannel("L"), mask=decoded_image.getchannel("A"))
        else:
            canvas.paste(decoded_image, mask=decoded_image.getchannel("A"))
        return canvas
    # A copy is independent of the file, which is closed.
    return decoded_image.copy() if decoded_image is image else decoded_image


def _eight_bit(image: PIL.Image.Image, name: str, is_white_zero: bool) -> PIL.Image.Image:
    """Convert a decoded image to the mode L, LA, RGB or RGBA.

    Args:
        image: decoded image.
        name: description of the file, for messages.
        is_white_zero: True for a TIFF file in which 0 is white. Pillow inverts the values of such files, but
            not if they have 16 bits.
    Raises: ValueError for values whose range is unknown.
    """
    # PNG files of 16 bits have the mode I in older versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _scaled_to_bytes(image, is_white_zero)
    if image.mode in ("I", "F"):
        number_kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise _CompleteError(
            f"{name}: the image has {number_kind}, whose brightest value is not stated in the file. Convert"
            " it to 8 or 16 bits per channel."
        )
    is_grey = image.mode in _GREY_MODES
    if image.mode in _ALPHA_MODES or image.has_transparency_data:
        alpha_mode = "LA" if is_grey else "RGBA"
        if image.mode in ("La", "PA"):
            image = image.convert("RGBA" if image.mode == "PA" else "LA")
        return image if image.mode == alpha_mode else image.convert(alpha_mode)
    opaque_mode = "L" if is_grey else "RGB"
    try:
        return image if image.mode == opaque_mode else image.convert(opaque_mode)
    except ValueError:
        raise _CompleteError(
            f"{name}: the colour space {image.mode} cannot be converted to RGB. Convert the image to RGB."
        ) from None


def _scaled_to_bytes(image: PIL.Image.Image, is_white_zero: bool) -> PIL.Image.Image:
    """Scale a 16-bit greyscale image to 8 bits: 0..65535 becomes 0..255, rounded.

    Args:
        image: decoded image in a 16-bit mode.
        is_white_zero: True: 0 is white.
    Returns: image in the mode L, or LA if one grey value is marked as transparent.
    """
    pixels = np.asarray(image)  # [H, W] of integers in either byte order
    # 65535 / 255 = 257. A table needs less memory than arithmetic on the complete image.
    byte_by_value = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    if is_white_zero:
        byte_by_value = byte_by_value[::-1]
    grey_image = PIL.Image.fromarray(byte_by_value[pixels])
    transparent_value = image.info.get("transparency")
    if isinstance(transparent_value, int):
        alpha_image = PIL.Image.fromarray(np.where(pixels == transparent_value, 0, 255).astype(np.uint8))
        grey_image = PIL.Image.merge("LA", (grey_image, alpha_image))
    # Without the entry on transparency, which does not apply to the bytes. EXIF data is kept.
    grey_image.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey_image


# Files of a folder or archive that are not read, by their names. The reasons are texts that follow the number
# of files, such as "2 HEIC images".
_HEIC = "HEIC images"
_RAW = "raw photographs"
_OTHER_IMAGES = "images in formats that are not read"
_VIDEOS = "videos"
_ARCHIVES = "archives"
_METADATA = "files of metadata that contain no image"
_OTHERS = "files of other types"
_SUFFIXES_BY_KIND = {
    _HEIC: (".heic", ".heif", ".hif"),
    _RAW: (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
    _OTHER_IMAGES: (
        *(".psd", ".tga", ".exr", ".hdr", ".svg", ".jp2", ".jxl", ".ico", ".pgm", ".ppm", ".pnm", ".pfm"),
        *(".pdf", ".dds", ".ktx2"),
    ),
    _VIDEOS: (".mp4", ".mov", ".avi", ".mkv", ".webm"),
    _ARCHIVES: (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"),
}
_REMEDY_BY_KIND = {
    _HEIC: ("Convert HEIC images to PNG or JPEG, for example with ImageMagick: magick photo.heic photo.png."),
    _RAW: "Develop raw photographs, and export them as PNG or JPEG.",
    _OTHER_IMAGES: "Convert them to PNG.",
    _VIDEOS: "Save single frames as PNG.",
    _ARCHIVES: "Unpack archives first.",
    _METADATA: "Delete such files.",
    _OTHERS: "Convert them to PNG if they are images.",
}
# Names of files that operating systems write into folders.
_METADATA_NAMES = (".ds_store", "thumbs.db", "desktop.ini")
# Suffixes of files that belong to images, such as labels, captions and point maps. They are not listed.
_COMPANION_SUFFIXES = (
    *(".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".yaml", ".yml", ".html", ".log"),
    *(".npy", ".npz", ".pkl", ".pt"),
)
_NAMES_IN_LINE = 3  # number of file names that are listed as examples


def _kind_of_file(name: str) -> str | None:
    """Return the kind of a file that is not read, by its name. None: an image, or a file beside images."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if path.name.startswith("._") or path.name.lower() in _METADATA_NAMES or "__MACOSX" in path.parts:
        return _METADATA
    if suffix in IMAGE_SUFFIXES or suffix in _COMPANION_SUFFIXES:
        return None
    return next((kind for kind, suffixes in _SUFFIXES_BY_KIND.items() if suffix in suffixes), _OTHERS)


def split_names(
    names: Iterable[str], read_start: Callable[[str], bytes] | None = None
) -> tuple[list[str], dict[str, list[str]]]:
    """Sort the files of a folder or archive into images and files that are not read.

    Args:
        names: names of files, relative to the folder. Names that end in "/" are folders.
        read_start: function that returns the first 16 bytes of a file. Phones and programs give the suffix
            .heic to JPEG files, too; such files are images. None: only the names count.
    Returns: the sorted names of the images, and the sorted names of the other files by their kind. Files that
        belong to images, such as dataset.json, are in neither.
    """
    image_names = []
    skipped_names: dict[str, list[str]] = {}
    for name in sorted(names):
        kind = _kind_of_file(name)
        if name.endswith("/"):
            continue
        if kind == _HEIC and read_start is not None and _is_readable(read_start(name)):
            image_names.append(name)
        elif kind is not None:
            skipped_names.setdefault(kind, []).append(name)
        elif name.lower().endswith(IMAGE_SUFFIXES):
            image_names.append(name)
    return image_names, skipped_names


def skipped_lines(skipped_names: Mapping[str, Sequence[str]]) -> list[str]:
    """Describe the files that are not read: one line for each kind, with their number and a remedy.

    Args: skipped_names: names by kind, from `split_names`.
    """
    return [
        f"Skipped {kind} ({len(names)}): {name_list(names)}. {_REMEDY_BY_KIND[kind]}"
        for kind, names in skipped_names.items()
    ]


def name_list(names: Sequence[str], limit: int = _NAMES_IN_LINE) -> str:
    """Join the first names by commas, and count the others.

    Args:
        names: file names.
        limit: largest number of names that are listed.
    """
    further_count = len(names) - limit
    listed_names = ", ".join(names[:limit])
    return listed_names if further_count <= 0 else f"{listed_names} and {further_count} more"


def joined_errors(messages: Sequence[str], limit: int = 20) -> str:
    """Join messages about several files to one line.

    Args:
        messages: messages that name their file; not empty.
        limit: largest number of messages that are listed.
    """
    further_count = len(messages) - limit
    further_text = f" And {further_count} more." if further_count > 0 else ""
    return " ".join(messages[:limit]) + further_text


def left_out_lines(messages: Sequence[str]) -> list[str]:
    """Return a line on images that are left out, with their number, or no line if there are none.

    Args: messages: messages of UnusableImageError, which name their file.
    """
    return [f"Left out images ({len(messages)}): {joined_errors(messages)}"] if messages else []
