"""Image files and tables that are broken on purpose: seeds, and what is done to them.

A *seed* is a sound file; a *mutation* takes its bytes and a generator and gives other bytes. *Lies* overwrite fields of a
header with numbers that readers trip over; *bombs* are small files that claim or hold far too much.
"""

import csv
import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Mutation = Callable[[bytes, np.random.Generator], bytes]
NUMBERS = (0, 1, 2, 3, 7, 8, 12, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 511, 512, 4095, 4096, 32767, 32768, 65534, 65535)
WIDE = (*NUMBERS, 2**20, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 2, 2**32 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e15, 1e30, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


def pick(generator: np.random.Generator, values: tuple | list) -> Any:
    return values[int(generator.integers(len(values)))]


def place(content: bytes, generator: np.random.Generator, length: int = 1) -> int:
    """Somewhere in the file, half of the time in its first 2 kB, where headers are."""
    end = max(1, len(content) - length)
    return int(generator.integers(min(end, 2048) if generator.random() < 0.5 else end))


def flip_bits(content: bytes, generator: np.random.Generator) -> bytes:
    made = bytearray(content)
    for _ in range(int(2 ** generator.integers(0, 8))):
        made[place(content, generator)] ^= 1 << int(generator.integers(8))
    return bytes(made)


def overwrite(content: bytes, generator: np.random.Generator) -> bytes:
    length = int(2 ** generator.integers(0, 10))
    run = bytes(length) if generator.random() < 0.2 else b"\xff" * length if generator.random() < 0.2 else generator.bytes(length)
    start = place(content, generator, length)
    return (content[:start] + run + content[start + length :])[: len(content)]


def truncate(content: bytes, generator: np.random.Generator) -> bytes:
    return content[: place(content, generator)]


def extend(content: bytes, generator: np.random.Generator) -> bytes:
    return content + (generator.bytes(int(generator.integers(1, 4096))) if generator.random() < 0.5 else content)


def move(content: bytes, generator: np.random.Generator) -> bytes:
    """Some bytes cut out and put in elsewhere, or just cut out."""
    length, start = int(2 ** generator.integers(0, 10)), place(content, generator)
    cut, rest = content[start : start + length], content[:start] + content[start + length :]
    there = place(rest, generator)
    return rest if generator.random() < 0.5 else rest[:there] + cut + rest[there:]


GENERIC: dict[str, Mutation] = {"bits": flip_bits, "run": overwrite, "truncated": truncate, "extended": extend, "moved": move}


# DICOM

PIXEL_ELEMENTS = {"SamplesPerPixel": 0x02, "PhotometricInterpretation": 0x04, "PlanarConfiguration": 0x06, "NumberOfFrames": 0x08}
PIXEL_ELEMENTS |= {"Rows": 0x10, "Columns": 0x11, "BitsAllocated": 0x100, "BitsStored": 0x101, "HighBit": 0x102}
PIXEL_ELEMENTS |= {"PixelRepresentation": 0x103, "PixelPaddingValue": 0x120, "WindowCenter": 0x1050, "WindowWidth": 0x1051}
PIXEL_ELEMENTS |= {"RescaleIntercept": 0x1052, "RescaleSlope": 0x1053, "PaletteDescriptor": 0x1101, "LUTDescriptor": 0x3002}
TEXTS = (b"MONOCHROME1", b"MONOCHROME2", b"RGB", b"PALETTE COLOR", b"YBR_FULL", b"YBR_FULL_422", b"YBR_ICT", b"ARGB", b"", b"\xff\xfe")
TEXTS += (b"0", b"-1", b"1E999", b"NaN", b"1e30", b"20000", b"2147483648", b"1\\2\\3", b"one", b"\\\\\\", b"9" * 16)
SYNTAXES = tuple(
    f"1.2.840.10008.1.2{tail}".encode()
    for tail in (
        "",
        ".1",
        ".1.99",
        ".2",
        ".5",
        ".4.50",
        ".4.51",
        ".4.57",
        ".4.70",
        ".4.80",
        ".4.81",
        ".4.90",
        ".4.91",
        ".4.201",
        ".4.100",
        ".9",
    )
)


def dicom_lie(content: bytes, generator: np.random.Generator) -> bytes:
    """One to three elements of group 0028 get another value, or another length."""
    for _ in range(int(generator.integers(1, 4))):
        tag = struct.pack("<HH", 0x28, pick(generator, list(PIXEL_ELEMENTS.values())))
        start = content.find(tag)
        if start < 0 or start + 10 > len(content):
            continue
        explicit = content[start + 4 : start + 6].isalpha()
        length = int.from_bytes(content[start + 6 : start + 8] if explicit else content[start + 4 : start + 8], "little")
        if generator.random() < 0.15:
            made = struct.pack("<H", pick(generator, NUMBERS)) if explicit else struct.pack("<I", pick(generator, WIDE))
            at = start + 6 if explicit else start + 4
            content = content[:at] + made + content[at + len(made) :]
            continue
        number = struct.pack("<H", pick(generator, NUMBERS))
        value = number if length == 2 else pick(generator, TEXTS).ljust(length)[:length] if length < 64 else b""
        content = content[: start + 8] + value + content[start + 8 + len(value) :]
    return content


def dicom_syntax(content: bytes, generator: np.random.Generator) -> bytes:
    """Another transfer syntax than the pixels have."""
    start = content.find(b"\x02\x00\x10\x00UI")
    if start < 0:
        return flip_bits(content, generator)
    length, syntax = int.from_bytes(content[start + 6 : start + 8], "little"), pick(generator, SYNTAXES)
    syntax += b"\0" * (len(syntax) % 2)
    return content[: start + 6] + struct.pack("<H", len(syntax)) + syntax + content[start + 8 + length :]


def dicom_lengths(content: bytes, generator: np.random.Generator) -> bytes:
    """The length of the pixels, or of the fragments and the offset table inside them, is another one."""
    start = content.rfind(b"\xe0\x7f\x10\x00")
    items = [start + 8] if start >= 0 else []
    while (start := content.find(b"\xfe\xff\x00\xe0", start + 1)) >= 0 and len(items) < 20:
        items.append(start + 4)
    if not items:
        return flip_bits(content, generator)
    at = pick(generator, items)
    return content[:at] + struct.pack("<I", pick(generator, WIDE)) + content[at + 4 :]


def in_codestream(content: bytes, generator: np.random.Generator) -> bytes:
    """Bits of the pixels alone, mostly of the first 200 bytes, where a codec keeps its header."""
    start = max(0, content.rfind(b"\xe0\x7f\x10\x00"))
    end = min(len(content), start + 200) if generator.random() < 0.7 else len(content)
    made = bytearray(content)
    for _ in range(int(2 ** generator.integers(0, 6))):
        made[int(generator.integers(start, max(start + 1, end)))] ^= 1 << int(generator.integers(8))
    return bytes(made)


@cache
def deflated_zeros(mebibytes: int) -> bytes:
    """A raw deflate stream of zeros, of about 1 kB per MiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    chunk = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return chunk * mebibytes + packer.flush()


def dicom_bomb(content: bytes, generator: np.random.Generator) -> bytes:
    """Deflated: a small header, then zeros without end, as one element or as elements of group 0."""
    meta_end = 144 + int.from_bytes(content[140:144], "little")
    syntax = dicom_syntax(content[:meta_end], np.random.default_rng(0))
    start = syntax.find(b"\x02\x00\x10\x00UI")
    length = int.from_bytes(syntax[start + 6 : start + 8], "little")
    head = syntax[:start] + b"\x02\x00\x10\x00UI\x16\x00" + SYNTAXES[2] + syntax[start + 8 + length :]
    head = head[:140] + struct.pack("<I", len(head) - 144) + head[144:]
    pixels = b"\xe0\x7f\x10\x00OW\x00\x00" + struct.pack("<I", 2**32 - 2)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first = packer.compress(content[meta_end : content.rfind(b"\xe0\x7f\x10\x00")] + pixels * int(generator.integers(2)))
    return head + first + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(pick(generator, (16, 300, 1500, 6000)))


# NIfTI

NIFTI_FIELDS = {40: "h", 42: "h", 44: "h", 46: "h", 48: "h", 50: "h", 70: "h", 72: "h", 76: "f", 80: "f", 84: "f", 88: "f"}
NIFTI_FIELDS |= {108: "f", 112: "f", 116: "f", 252: "h", 254: "h", 256: "f", 260: "f", 268: "f", 280: "f", 284: "f", 300: "f", 320: "f"}
NIFTI_FIELDS |= {0: "i", 344: "i", 348: "i", 352: "i", 356: "i", 123: "b"}
DATATYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 255, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304)


def nifti_lie(content: bytes, generator: np.random.Generator) -> bytes:
    made = bytearray(content.ljust(360, b"\0"))
    for _ in range(int(generator.integers(1, 4))):
        at = pick(generator, list(NIFTI_FIELDS))
        kind = NIFTI_FIELDS[at]
        number = pick(generator, DATATYPES) if at == 70 else pick(generator, REALS if kind == "f" else NUMBERS)
        made[at : at + struct.calcsize(kind)] = struct.pack(
            f"<{kind}", number if kind == "f" else number % {"b": 128, "h": 32768, "i": 2**31}[kind]
        )
    return bytes(made)


def nifti_bomb(content: bytes, generator: np.random.Generator) -> bytes:
    """A header that claims up to 128 TiB, or an extension or voxels of GB, before zeros without end; packed by `gzip`."""
    made = bytearray(content.ljust(360, b"\0"))
    sides = pick(generator, ((3, 32767, 32767, 32767, 1), (4, 512, 512, 512, 8), (3, 1000, 1000, 500, 1), (3, 4, 4, 4, 1)))
    struct.pack_into("<5h", made, 40, *sides)
    struct.pack_into("<f", made, 108, pick(generator, (352.0, 2.0**26, 1e9, 1e15)))
    struct.pack_into("<4B2i", made, 348, 1, 0, 0, 0, pick(generator, (16, 2**26, 2**31 - 16, -16)), 6)
    return gzip.compress(bytes(made), 1) + gzip.compress(bytes(2**22), 9) * pick(generator, (1, 64, 500))


def packed(mutation: Mutation) -> Mutation:
    """A mutation of what a `.nii.gz` holds."""
    return lambda content, generator: gzip.compress(mutation(gzip.decompress(content), generator), 1)


# Pictures


def png_lie(content: bytes, generator: np.random.Generator) -> bytes:
    """IHDR with other numbers and a right checksum, or a chunk with another length."""
    if generator.random() < 0.3:
        starts = [start for kind in (b"IHDR", b"IDAT", b"IEND", b"PLTE") if (start := content.find(kind)) >= 4]
        at = pick(generator, starts) - 4
        return content[:at] + struct.pack(">I", pick(generator, WIDE)) + content[at + 4 :]
    header = list(struct.unpack(">IIBBBBB", content[16:29]))
    for _ in range(int(generator.integers(1, 3))):
        field = int(generator.integers(7))
        header[field] = pick(generator, WIDE) if field < 2 else int(pick(generator, (0, 1, 2, 3, 4, 6, 8, 16, 255)))
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", *header)
    return content[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + content[33:]


def png_bomb(content: bytes, generator: np.random.Generator) -> bytes:
    """A grey picture of zeros: 16 to 400 million pixels in at most 400 kB."""
    side = pick(generator, (4000, 9000, 13000, 20000, 2**31 - 1))
    packer = zlib.compressobj(9)
    data = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(pick(generator, (1, 100, 400)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return content[:8] + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held)) for kind, held in chunks
    )


def tiff_lie(content: bytes, generator: np.random.Generator) -> bytes:
    """Fields of the first pages' tags with other types, counts and values."""
    if content[:2] != b"II":
        return flip_bits(content, generator)
    start = int.from_bytes(content[4:8], "little")
    count = min(40, int.from_bytes(content[start : start + 2], "little"))
    made = bytearray(content.ljust(start + 2 + 12 * count + 4, b"\0"))
    for _ in range(int(generator.integers(1, 4))):
        at = start + 2 + 12 * int(generator.integers(count + 1))
        field = pick(generator, ("type", "count", "value", "value", "value", "short"))
        where = at + {"type": 2, "count": 4, "value": 8, "short": 8}[field]
        short = field in {"type", "short"}
        struct.pack_into("<H" if short else "<I", made, min(where, len(made) - 4), pick(generator, NUMBERS if short else WIDE))
    return bytes(made)


def jpeg_lie(content: bytes, generator: np.random.Generator) -> bytes:
    """Another size, depth or sampling in the frame's header, or another length of a segment."""
    starts = [
        at for at in range(len(content) - 12) if content[at] == 0xFF and content[at + 1] in {0xC0, 0xC2, 0xC4, 0xDB, 0xDA, 0xE0, 0xE1}
    ]
    if not starts:
        return flip_bits(content, generator)
    at = pick(generator, starts) + 2 + pick(generator, (0, 2, 3, 5, 7, 8, 9))
    return content[:at] + struct.pack(">H", pick(generator, NUMBERS)) + content[at + 2 :]


# Arrays


def npy_header(generator: np.random.Generator, shape: str | None = None) -> bytes:
    """A header of an array that may not be the one that follows."""
    sides = [str(pick(generator, (*WIDE, -1, 2**40, 2**62, 2**63, 2**70))) for _ in range(int(generator.integers(0, 5)))]
    shape = shape or f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"
    kind = pick(generator, ("|u1", "<f4", "<f8", "<i8", ">u2", "|O", "<c16", "<U99999", "|V0", "<f2", "|b1", "<M8[s]", "nonsense", "|S0"))
    order = pick(generator, ("True", "False", "False", "None"))
    header = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    version, length = pick(generator, ((b"\x01\0", "<H"), (b"\x02\0", "<I"), (b"\x03\0", "<I"), (b"\x09\x09", "<H")))
    return b"\x93NUMPY" + version + struct.pack(length, len(header)) + header


def npy_lie(content: bytes, generator: np.random.Generator) -> bytes:
    return npy_header(generator) + content[128:]


def npz_lie(content: bytes, generator: np.random.Generator) -> bytes:
    """One member with another header, other bytes, another name or none at all, in an archive that is sound."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        chosen = pick(generator, old.namelist())
        for name in old.namelist():
            held = old.read(name)
            if name == chosen:
                change = int(generator.integers(5))
                held = [npy_lie, flip_bits, overwrite, truncate, lambda same, _: same][change](held, generator)
                name = pick(generator, ("other.npy", "test_images", "../../evil.npy", "")) if change == 4 else name
            if name:
                new.writestr(name, held)
    return made.getvalue()


def npz_bomb(content: bytes, generator: np.random.Generator) -> bytes:
    """Members that claim terabytes, or hold gigabytes of zeros."""
    header = npy_header(np.random.default_rng(0), pick(generator, ("(4, 1000000, 1000000)", "(1000000000000, 8, 8)", "(64, 4096, 4096)")))
    header = header.replace(b"'|u1'", b"'<f8'")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("test_images.npy", "test_labels.npy"):
            archive.writestr(name, header + bytes(2**20 * pick(generator, (0, 1, 64))))
    return made.getvalue()


# Tables


def csv_cells(content: bytes, generator: np.random.Generator) -> bytes:
    """Some cells are other than they should be."""
    odd = (
        "",
        " ",
        '"',
        "''",
        "\0",
        "\r",
        "\n",
        "a,b",
        "nan",
        "-1",
        "1e999",
        "../../etc/passwd",
        "x" * 300,
        "x" * 200_000,
        "\ufeff",
        "\U0001f9e0",
    )
    odd += ("0-1.png\0", "ID_0001_any", "ID__", "é" * 3, "=1+1", "|;|", "No Finding", "true", "a" * 5000 + ".png", "\u2028", "\\", "/", ".")
    lines = list(csv.reader(io.StringIO(content.decode(), newline="")))
    for _ in range(int(2 ** generator.integers(0, 5))):
        line = pick(generator, lines)
        if line and generator.random() < 0.8:
            line[int(generator.integers(len(line)))] = pick(generator, odd)
        else:
            lines.insert(int(generator.integers(len(lines) + 1)), pick(generator, ([], [""], ["a"] * 50, line, [pick(generator, odd)])))
    made = io.StringIO(newline="")
    csv.writer(made, quoting=pick(generator, (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), escapechar="\\").writerows(lines)
    return made.getvalue().encode()


def csv_text(content: bytes, generator: np.random.Generator) -> bytes:
    """Other encodings, delimiters, line ends, quotes that never end."""
    text = content.decode()
    changed = {
        "utf-16": text.encode("utf-16"),
        "utf-32": text.encode("utf-32"),
        "latin-1": text.replace("e", "é").encode("latin-1"),
        "surrogates": text.replace("e", "\ud800").encode("utf-8", "surrogatepass"),
        "bom": b"\xef\xbb\xbf\xef\xbb\xbf" + content,
        "semicolons": content.replace(b",", b";"),
        "tabs": content.replace(b",", b"\t"),
        "returns": content.replace(b"\r\n", b"\r"),
        "quotes": content.replace(b",", b',"', int(generator.integers(1, 20))),
        "nuls": content.replace(b",", b",\0", int(generator.integers(1, 20))),
        "header alone": content.split(b"\n")[0],
        "no header": b"\n".join(content.split(b"\n")[1:]),
        "header twice": content.split(b"\n")[0] + b"\n" + content,
        "same columns": content.replace(b"label", b"file", 1),
        "field": content + b'"' + b"x" * int(generator.integers(1, 2**18)) + b'",1\n',
        "nothing": b"",
        "lines": b"\n" * 10_000 + content,
        "columns": b",".join(b"c%d" % number for number in range(5000)) + b"\n" + content,
    }
    return pick(generator, list(changed.values()))


DICOM = GENERIC | {"lie": dicom_lie, "syntax": dicom_syntax, "lengths": dicom_lengths, "codestream": in_codestream}
NIFTI = GENERIC | {"lie": nifti_lie}
MUTATIONS: dict[str, dict[str, Mutation]] = {
    "dicom": DICOM,
    "nii": NIFTI,
    "nii.gz": GENERIC | {f"packed {name}": packed(mutation) for name, mutation in NIFTI.items()},
    "png": GENERIC | {"lie": png_lie},
    "tif": GENERIC | {"lie": tiff_lie},
    "jpg": GENERIC | {"lie": jpeg_lie},
    "bmp": GENERIC,
    "npy": GENERIC | {"lie": npy_lie},
    "npz": GENERIC | {"lie": npz_lie},
    "csv": GENERIC | {"cells": csv_cells, "text": csv_text},
}
"""By kind of seed."""
BOMBS: dict[str, Mutation] = {"dicom": dicom_bomb, "nii.gz": nifti_bomb, "png": png_bomb, "npz": npz_bomb}
BOMB_SHARE = 0.02


def mutate(content: bytes, kind: str, generator: np.random.Generator) -> tuple[bytes, str]:
    """Broken bytes, and what was done to them. Lies and edits of a table are as frequent as all of `GENERIC`."""
    if kind in BOMBS and generator.random() < BOMB_SHARE:
        return BOMBS[kind](content, generator), "bomb"
    own = [name for name in MUTATIONS[kind] if name not in GENERIC]
    name = pick(generator, own if own and generator.random() < 0.5 else list(GENERIC))
    return MUTATIONS[kind][name](content, generator), name
