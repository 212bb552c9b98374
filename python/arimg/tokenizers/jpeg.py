"""Pictures as the bytes of their JPEG scan (JPEG-LM, arXiv 2408.08459), and the grammar of those bytes.

Baseline JPEG, 4:2:0, a restart marker behind every 16 x 16 block (MCU), so that an error stays in its block.
All that pictures of one size share (tables, sizes, headers) is kept once, as `head`; the scan is what
differs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VOCABULARY, PAD = 257, 256  # the bytes, and what stands behind the end of a picture
_MCU = (0, 0, 0, 0, 1, 1)  # tables of the six blocks: four of luma, two of chroma
_SOS, _DHT, _EOI, _RST = 0xDA, 0xC4, 0xD9, 0xD0
_SPARE = 8  # bytes that pictures end before their budget does: a byte of FF is followed by one of 00
_NEVER = 1 << 30


class Jpeg:
    """Codec of square pictures of `size` pixels, a multiple of 16.

    encode: images [B, 3, S, S] in [0, 1] -> int64 [B, n], padded by PAD. decode: the way back, for any bytes:
    what a broken scan lacks is grey. restart: without markers, for comparison.
    """

    def __init__(self, size: int, quality: int = 25, restart: bool = True) -> None:
        if size < 16 or size % 16:
            raise ValueError(f"expected a size that is a multiple of 16, got {size}")
        self.size, self.quality, self.restart = size, quality, restart
        self.blocks = (size // 16) ** 2
        self.head, _ = self._split(self._file(np.full((size, size, 3), 128, np.uint8)))
        self.grammar = Grammar(huffman_codes(self.head), self.blocks)

    def _file(self, pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        extra = {"restart_marker_blocks": 1} if self.restart else {}
        Image.fromarray(pixels).save(out, "JPEG", quality=self.quality, subsampling=2, **extra)
        return out.getvalue()

    def _split(self, file: bytes) -> tuple[bytes, bytes]:
        """(everything before the scan, the scan with the end marker)."""
        at = next(start for marker, start, _ in segments(file) if marker == _SOS)
        end = at + int.from_bytes(file[at : at + 2], "big")
        return file[:end], file[end:]

    def scan(self, pixels: np.ndarray) -> bytes:
        """uint8 [S, S, 3] -> the bytes of the scan."""
        head, scan = self._split(self._file(pixels))
        if head != self.head:
            raise ValueError(f"expected pictures [{self.size}, {self.size}, 3], got {list(pixels.shape)}")
        return scan

    def pixels(self, scan: bytes) -> np.ndarray:
        """The bytes of a scan -> uint8 [S, S, 3]; missing blocks are grey."""
        scan = scan if scan.endswith(b"\xff\xd9") else self._completed(scan)
        return np.asarray(Image.open(io.BytesIO(self.head + scan)).convert("RGB"))

    def _completed(self, scan: bytes) -> bytes:
        """Markers of the blocks that are missing, and the end."""
        scan = scan[:-1] if scan.endswith(b"\xff") else scan
        there = sum(scan[i] == 0xFF and scan[i + 1] & 0xF8 == _RST for i in range(len(scan) - 1))
        markers = [bytes((0xFF, _RST + n % 8)) for n in range(there, self.blocks - 1)]
        return scan + b"".join(markers) + b"\xff\xd9"

    def encode(self, images: Tensor) -> Tensor:
        arrays = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = [torch.tensor(list(self.scan(a))) for a in arrays]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def decode(self, tokens: Tensor) -> Tensor:
        arrays = [self.pixels(bytes(t for t in row if t != PAD)) for row in tokens.tolist()]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def segments(file: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment of a header, up to the scan's; start is at its length field."""
    at = 2
    while True:
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        yield marker, at + 2, at + 2 + length
        if marker == _SOS:
            return
        at += 2 + length


def huffman_codes(head: bytes) -> dict[tuple[int, int], dict[tuple[int, int], int]]:
    """The tables of a header: (0: DC or 1: AC, table) -> {(length, code): symbol}."""
    tables = {}
    for marker, start, end in segments(head):
        at = start + 2
        while marker == _DHT and at < end:
            counts, codes, code = head[at + 1 : at + 17], {}, 0
            symbols = iter(head[at + 17 : at + 17 + sum(counts)])
            for length, count in enumerate(counts, 1):
                for _ in range(count):
                    codes[length, code] = next(symbols)
                    code += 1
                code <<= 1
            tables[head[at] >> 4, head[at] & 15] = codes
            at += 17 + sum(counts)
    return tables


class Place(NamedTuple):
    """Between two bytes of a scan: the block of the picture and of the MCU, the next coefficient, the bits of
    the code so far, and how many bits of a value are still to come. stuffed: the last byte was FF and 00 must
    follow;
    marker: 1 before FF and 2 before the second byte of a marker, 3 behind the last.
    """

    mcu: int = 0
    block: int = 0
    coefficient: int = 0
    length: int = 0
    code: int = 0
    value_bits: int = 0
    stuffed: bool = False
    marker: int = 0


class _After(NamedTuple):
    """Behind one byte more, for each of the 256 bytes: the place, and in how many bytes its MCU can end."""

    places: tuple[Place | None, ...]
    rest: np.ndarray


class Grammar:
    """Which bytes may follow which: exactly the scans whose every block decodes.

    `allowed(place)` says which bytes may stand at a place, `step(place, byte)` what comes behind one.
    """

    def __init__(self, codes: dict[tuple[int, int], dict[tuple[int, int], int]], blocks: int) -> None:
        self.codes, self.blocks = codes, blocks
        self._end = lru_cache(maxsize=None)(self._shortest_end)
        self._length = lru_cache(maxsize=None)(self._length_of)
        self.beginnings = {key: _beginnings(key[0], table) for key, table in codes.items()}
        blank = [self._length(0, t, 0) + self._length(1, t, 0) for t in _MCU]
        self.blank = [sum(blank[i + 1 :]) for i in range(len(_MCU))]  # bits of the blocks behind, all empty
        self.mcu_bytes = -(-sum(blank) // 8) + 3  # of an empty MCU: a byte for FF 00, and the marker
        self._after = lru_cache(maxsize=None)(self._behind)

    def _length_of(self, kind: int, table: int, symbol: int) -> int:
        return next(length for (length, _), s in self.codes[kind, table].items() if s == symbol)

    def step(self, place: Place, byte: int) -> Place:
        """The place behind this byte. Raises ValueError where it may not stand."""
        after = self._after(place._replace(mcu=0)).places[byte]
        if after is None or (place.marker == 2 and byte != self._marker(place)):
            raise ValueError(f"expected a byte that the JPEG grammar allows, got {byte}")
        return after if after.marker == 3 else after._replace(mcu=place.mcu + (place.marker == 2))

    def allowed(self, place: Place, budget: int | None = None) -> np.ndarray:
        """bool [256]. budget: how many bytes there may still be; then bytes from which the picture can end in
        time, or where there are none, those from which it ends soonest.
        """
        if place.marker == 2:
            return np.arange(256) == self._marker(place)
        rest = self._after(place._replace(mcu=0)).rest
        if budget is None:
            return rest < _NEVER
        left = budget - 1 - _SPARE - (self.blocks - 1 - place.mcu) * self.mcu_bytes
        in_time = rest <= left
        return in_time if in_time.any() else rest == rest.min()

    def _marker(self, place: Place) -> int:
        return _EOI if place.mcu + 1 == self.blocks else _RST + place.mcu % 8

    def _behind(self, place: Place) -> _After:
        places = self._places(place)
        return _After(places, np.array([_NEVER if p is None else self._rest(p) for p in places]))

    def _places(self, place: Place) -> tuple[Place | None, ...]:
        """All bytes at once: lists of places that grow like a tree, bit by bit, in the order of the bytes."""
        if place.stuffed:
            return (place._replace(stuffed=False), *[None] * 255)
        if place.marker == 1:
            return (*[None] * 255, place._replace(marker=2))
        if place.marker == 2:  # which of the markers is `step`'s to know
            ends = {_EOI: Place(marker=3), **{_RST + n: Place() for n in range(8)}}
            return tuple(ends.get(byte) for byte in range(256))
        if place.marker == 3:
            return (None,) * 256
        level: list[Place | None] = [place]
        for _ in range(8):
            level = [self._step(at, bit) for at in level for bit in (0, 1)]
        return tuple(_between(at, byte) for byte, at in enumerate(level))

    def _step(self, at: Place | None, bit: int) -> Place | None:
        if at is not None and at.block == len(_MCU):  # what is left of the last byte is ones
            return at if bit else None
        return None if at is None else self._bit(at, bit)

    def _bit(self, at: Place, bit: int) -> Place | None:
        if at.value_bits:
            left = at.value_bits - 1
            return at._replace(value_bits=left) if left else self._settled(at._replace(value_bits=0))
        key = (int(at.coefficient > 0), _MCU[at.block])
        length, code = at.length + 1, at.code << 1 | bit
        symbol = self.codes[key].get((length, code))
        if symbol is None:
            alive = self._end(key, length, code, at.coefficient) < _NEVER
            return at._replace(length=length, code=code) if alive else None
        run, size = (symbol >> 4, symbol & 15) if key[0] else (0, symbol)
        at = at._replace(length=0, code=0)
        if key[0] and size == 0 and run != 15:  # the end of the block; runs of 1 to 14 zeros are no baseline
            return self._settled(at._replace(coefficient=64)) if run == 0 else None
        coefficient = at.coefficient + run + 1
        if coefficient > 64:
            return None
        at = at._replace(coefficient=coefficient, value_bits=size)
        return at if size else self._settled(at)

    def _settled(self, at: Place) -> Place:
        """A coefficient is complete: the block may be, too."""
        return at if at.coefficient < 64 else Place(mcu=at.mcu, block=at.block + 1)

    def _rest(self, at: Place) -> int:
        """Bytes in which this MCU and its marker can end: its block at once, the others empty."""
        if at.marker:
            return 3 - at.marker + int(at.stuffed)
        table = _MCU[min(at.block, len(_MCU) - 1)]
        if at.length:
            bits = self._end((int(at.coefficient > 0), table), at.length, at.code, at.coefficient)
        else:
            bits = at.value_bits + (0 if at.coefficient == 64 else self._length(1, table, 0))
            bits += self._length(0, table, 0) if at.coefficient == 0 else 0
        return -(-(bits + self.blank[at.block]) // 8) + 2 + int(at.stuffed)

    def _shortest_end(self, key: tuple[int, int], length: int, code: int, coefficient: int) -> int:
        """The fewest bits to the end of the block behind the beginning of a code; _NEVER: no code begins so,
        or none that fits into the block.
        """
        end = self._length(1, key[1], 0)
        return min(
            (
                bits + (0 if moves == 0 or coefficient + moves == 64 else end)
                for moves, bits in self.beginnings[key].get((length, code), ())
                if coefficient + moves <= 64
            ),
            default=_NEVER,
        )


def _beginnings(kind: int, table: dict[tuple[int, int], int]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For each beginning of a code: of the codes that begin so, by how many coefficients they move on (0: to
    the end of the block), and their bits from there with those of the value.
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (length, code), symbol in table.items():
        moves = 0 if kind and symbol == 0 else (symbol >> 4) * kind + 1
        for n in range(1, length):
            found.setdefault((n, code >> (length - n)), []).append((moves, length - n + (symbol & 15)))
    return found


def _between(at: Place | None, byte: int) -> Place | None:
    """Where the bits of a whole byte lead to."""
    if at is None:
        return None
    if at.block == len(_MCU):
        at = Place(mcu=at.mcu, marker=1)
    return at._replace(stuffed=byte == 0xFF)
