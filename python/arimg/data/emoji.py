"""Emoji drawings in five styles, rendered from the icon packages on npm into one tar of PNG files.

The five sets are under Apache-2.0 (noto, noto-v1, fxemoji) or MIT (fluent, fluent-flat); the notices stand in
`third_party/NOTICES.md`. A member of the tar is called `<category>/<style>/<group>~<name>.png`: the folder is
the class, and `group` (the drawing's name without gender and direction) keeps all styles and variants of one
name in one split.
Needs `npm` and the extra `arimg[train]` (resvg-py).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

STYLES = {
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fxemoji": "@iconify-json/fxemoji",
    "fluent": "@iconify-json/fluent-emoji",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
}
ALLOWED_LICENCES = {"Apache-2.0", "MIT"}
CATEGORIES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_SKIN_NAME = re.compile(r"(-(medium-)?(light|dark)|-medium)(-skin-tone)?(-|$)|skin-tone")
_FILLER = {"with", "and", "of", "the", "sign", "symbol", "face", "emoji", "for", "a", "button", "in", "on"}
_VARIANT = re.compile(r"^(man|woman|person|men|women|people)-(?=.)|-facing-right$")
_FAMILY = re.compile(r"^(family|kiss|couple-with-heart)\b.*")


@dataclass(frozen=True)
class Drawing:
    """One drawing: its SVG text, its class (`category/style`), its name and the group that is never split."""

    svg: str
    category: str
    style: str
    name: str

    @property
    def group(self) -> str:
        """The name without gender and direction: `woman-running-facing-right` belongs to `running`."""
        return _FAMILY.sub(r"\1", _VARIANT.sub("", _VARIANT.sub("", self.name)))

    @property
    def member(self) -> str:
        return f"{self.category}/{self.style}/{self.group}~{self.name}.png"


def _words(text: str) -> list[str]:
    return [w for w in re.split(r"[^a-z0-9]+", text.lower()) if w]


def _signatures(text: str) -> tuple[str, str]:
    """The letters of a name, and the same without filler words: sets differ in both."""
    words = _words(text)
    return "".join(words), "".join(w for w in words if w not in _FILLER)


class Names:
    """Maps the names that the sets use to one canonical name and its category (those of the noto set).

    A name is looked up as it is, through aliases, through its code point's Unicode name, and without filler
    words. A drawing that is still unknown is left out: it could be a held-out drawing under another name.
    """

    def __init__(self, noto: dict[str, Any]) -> None:
        self.category = {
            name: CATEGORIES[key] for key, names in noto["metadata"]["categories"].items() for name in names
        }
        self._by_code = {code: name for code, name in noto["chars"].items() if name in self.category}
        self._by_signature: dict[str, str] = {}
        spellings = [(name, name) for name in self.category]
        spellings += [(alias, entry["parent"]) for alias, entry in noto["icons"].get("aliases", {}).items()]
        for code, name in self._by_code.items():
            points = [p for p in code.split("-") if p != "fe0f"]
            if len(points) == 1:
                spellings.append((unicodedata.name(chr(int(points[0], 16)), name), name))
        for which in (0, 1):  # every full spelling before any shortened one
            for spelling, name in spellings:
                if name in self.category:
                    self._by_signature.setdefault(_signatures(spelling)[which], name)

    def canonical(self, name: str, codes: list[str]) -> str | None:
        for code in codes:
            if code in self._by_code:
                return self._by_code[code]
        if name in self.category:
            return name
        full, short = _signatures(name)
        return self._by_signature.get(full) or self._by_signature.get(short)


def _load_set(package: Path) -> dict[str, Any]:
    parts = {
        part: json.loads((package / f"{part}.json").read_text())
        for part in ("icons", "metadata", "chars", "info")
    }
    licence = parts["info"]["license"]["spdx"]
    if licence not in ALLOWED_LICENCES:
        raise ValueError(f"expected a licence in {sorted(ALLOWED_LICENCES)}, got {licence} for {package}")
    return parts


def _svg(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    box = [
        icon.get(key, defaults.get(key, 0 if key in ("left", "top") else 16))
        for key in ("left", "top", "width", "height")
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(str(v) for v in box)}">{icon["body"]}</svg>'
    )


def read_drawings(packages: dict[str, Path]) -> Iterator[Drawing]:
    """Yields every drawing without skin tone of the unpacked packages (style -> folder), in a fixed order."""
    sets = {style: _load_set(folder) for style, folder in packages.items()}
    names = Names(sets["noto"])
    flat_codes = sets["fluent-flat"]["chars"] if "fluent-flat" in sets else {}
    for style, parts in sets.items():
        chars = parts["chars"] or (flat_codes if style == "fluent" else {})
        codes: dict[str, list[str]] = {}
        for code, name in chars.items():
            codes.setdefault(name, []).append(code)
        taken = set()
        for name, icon in sorted(parts["icons"]["icons"].items()):
            own = codes.get(name, [])
            toned = any(_SKIN_TONES & set(code.split("-")) for code in own) or (
                not own and _SKIN_NAME.search(name)
            )
            canonical = None if toned or icon.get("hidden") else names.canonical(name, own)
            if canonical is None or canonical in taken or "skin-tone" in canonical:
                continue
            taken.add(canonical)
            yield Drawing(_svg(icon, parts["icons"]), names.category[canonical], style, canonical)


def render(svg: str, size: int) -> bytes:
    """Renders an SVG text centred on a white square of `size` pixels and returns the PNG file."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError('rendering needs resvg-py: install it with `pip install "arimg[train]"`') from error
    from PIL import Image

    drawn = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))
    ).convert("RGBA")
    page = Image.new("RGBA", (size, size), "white")
    drawn.thumbnail((size, size))
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    out = io.BytesIO()
    page.convert("RGB").save(out, "PNG")
    return out.getvalue()


def download(folder: Path) -> dict[str, Path]:
    """Fetches the five npm packages into `folder` and unpacks them; returns style -> package folder."""
    if shutil.which("npm") is None:
        raise ValueError("fetching the emoji needs npm (it comes with Node.js), which was not found")
    folders = {}
    for style, package in STYLES.items():
        target = folder / style
        target.mkdir(parents=True, exist_ok=True)
        if not (target / "package").is_dir():
            done = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=target, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise ValueError(f"npm could not fetch {package}: {done.stderr.strip().splitlines()[-1:]}")
            with tarfile.open(target / done.stdout.strip().splitlines()[-1]) as archive:
                archive.extractall(target, filter="data")
        folders[style] = target / "package"
    return folders


def build(out: Path, size: int = 64, packages: Path | None = None) -> tuple[int, int]:
    """Writes `out/emoji<size>.tar` and returns (drawings, classes).

    `packages`: a folder that keeps the npm packages; without it they are fetched into a temporary folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        drawings = list(read_drawings(download(packages or Path(scratch))))
    path = out / f"emoji{size}.tar"
    partial = path.with_suffix(".tar.part")
    with tarfile.open(partial, "w") as archive:
        for drawing in tqdm(drawings, desc="render", unit="img"):
            data = render(drawing.svg, size)
            member = tarfile.TarInfo(drawing.member)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    partial.replace(path)
    return len(drawings), len({(d.category, d.style) for d in drawings})
