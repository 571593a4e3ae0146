"""JPEG by its markers (ITU-T T.81, annex B): which files any decoder takes alike, and where their image ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RST0, RST7, SOI, EOI, SOS, DNL = 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDC
APP0, APP14, APP15, COM = 0xE0, 0xEE, 0xEF, 0xFE
BASELINE, PROGRESSIVE = 0xC0, 0xC2
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the others of these are tables
STANDALONE = {0x01, *range(RST0, EOI)}  # markers without a segment: TEM, restarts, another SOI
YCBCR = 1  # of the transforms that Adobe's segment names


class PlainJpeg(NamedTuple):
    """One complete image without its metadata. ``size``: (width, height) in pixels, as Pillow has it."""

    data: bytes
    size: tuple[int, int]


def read_plain(file: bytes) -> PlainJpeg | None:
    """The first image of a JPEG file, if every decoder of baseline and progressive JPEG takes it alike.

    That is: Huffman codes, 8 bits, one frame, grey or YCbCr, each segment and the end where they should be. Whether the
    codes between are sound shows in decoding. Comments and APP segments are left out but for JFIF's and Adobe's, so
    that no decoder turns by EXIF; so is what follows the end, as a camera's previews do.

    Returns: None for any other file, sound or not.
    """
    if file[:2] != bytes((0xFF, SOI)):
        return None
    kept, at, scans = [file[:2]], 2, 0
    frame, is_grey, transform = None, False, YCBCR
    for marker in _find_markers(file).tolist():
        if marker < at:  # inside of a segment
            continue
        if not scans and file[at:marker].strip(b"\xff"):
            return None
        kept.append(file[at:marker])
        kind, start = file[marker + 1], marker + 2
        if kind == EOI:
            return PlainJpeg(b"".join([*kept, bytes((0xFF, EOI))]), frame) if frame and scans else None
        end = start + int.from_bytes(file[start : start + 2])
        segment = file[start + 2 : end]
        if kind in STANDALONE or kind == DNL or not start + 2 <= end <= len(file):
            return None
        if kind in FRAMES:
            if frame or not _is_plain(kind, segment):
                return None
            frame = int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3])
            is_grey = segment[5] == 1
        elif kind == APP14 and segment[:5] == b"Adobe" and len(segment) >= 12:
            transform = segment[11]
        elif kind == SOS:
            if frame is None or not (is_grey or transform == YCBCR):
                return None
            scans += 1
        if not (APP0 < kind <= APP15 or kind == COM) or kind == APP14:
            kept.append(bytes((0xFF, kind)) + file[start:end])
        at = end
    return None


def _find_markers(file: bytes) -> NDArray[np.intp]:
    """Where markers begin, those that are in segments too; stuffed bytes and restarts belong to a scan."""
    codes = np.frombuffer(file, np.uint8)
    places = np.flatnonzero(codes[:-1] == 0xFF)
    kinds = codes[places + 1]
    return places[(kinds != 0) & (kinds != 0xFF) & ~((kinds >= RST0) & (kinds <= RST7))]


def _is_plain(kind: int, segment: bytes) -> bool:
    """Whether the frame of an SOF segment is one that decoders agree on."""
    if kind not in (BASELINE, PROGRESSIVE) or len(segment) < 6 or segment[0] != 8:
        return False
    components = [segment[at : at + 3] for at in range(6, len(segment), 3)]
    if len(segment) != 6 + 3 * segment[5] or bytes(2) in (segment[1:3], segment[3:5]):
        return False
    if len(components) == 1:
        return components[0][1] == 0x11
    return len(components) == 3 and bytes(each[0] for each in components) != b"RGB"
