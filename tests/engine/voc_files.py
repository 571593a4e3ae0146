"""Pascal VOC annotations, written for tests."""

from __future__ import annotations

from pathlib import Path

Box = tuple[object, object, object, object]


def write_object(name: str, box: Box, extra: str = "") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    bndbox = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners)
    part = f"<part><name>head</name><bndbox>{bndbox}</bndbox></part>"
    return f"<object><name>{name}</name>{extra}<bndbox>{bndbox}</bndbox>{part}</object>"


def write_xml(folder: Path, stem: str, *objects: str, filename: str | None = None, size: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.xml"
    size = size or "<size><width>80</width><height>60</height><depth>3</depth></size>"
    named = f"<filename>{filename or stem + '.jpg'}</filename>"
    path.write_text(f"<annotation><folder>VOC</folder>{named}{size}{''.join(objects)}</annotation>")
    return path
