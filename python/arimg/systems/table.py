"""The list of all systems, for the terminal and as docs/systems.md."""

from __future__ import annotations

from arimg.systems import measure
from arimg.systems.base import System
from arimg.systems.measure import Measured
from arimg.systems.published import PUBLISHED
from arimg.systems.registry import systems

HEAD = (
    "system",
    "paper",
    "status",
    "tokens",
    "passes",
    "ms a picture",
    "plain method",
    "passes",
    "ms",
    "faster",
)
_INTRO = """# Systems

Each is one short file of `python/arimg/systems/`: its composition, its numbers, its deviations.
```
arimg systems list
arimg systems train {example} --data photos.tar          # the small version, minutes on a CPU; runs/{example}
arimg systems sample {example} -o grid.png
arimg systems sample detailflow --previews               # pictures of the first 1, 2, 4, ... tokens
arimg systems bench {example}                            # the rows below
```
This page is written by `arimg systems list --markdown`. Status: which classes load released weights, and
how, [is here](drop-in.md#released-weights-of-other-systems).

Measured: {about}; one picture at a time, the tokenizer's decoder not included. "Plain method" is the same
network and weights sampled the plain way, or what its name says. The models are tiny (about 64 tokens, 2
to 6 layers), so a pass costs little, and what saves passes at a price of its own (speculation,
refinement) does not pay here. Trained for 150 to 600 steps, their pictures are coloured shapes on white;
JPEG-LM's, after 600, are still mosaics of waves (5.0 nats a byte on real pictures, 5.6 on random ones).
"""


def text() -> str:
    """One line per system: family, name, paper, status, tokens, passes and milliseconds of a picture."""
    measured = measure.read()
    rows = [(s.name, s.family, s.paper, *_cells(s, measured)[2:6], s.mechanism) for s in systems().values()]
    head = ("system", "family", "paper", "status", "tokens", "passes", "ms", "")
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join([*lines, "", f"Not done yet: {', '.join(missing())}."])


def missing() -> list[str]:
    """Titles of the published systems that nothing stands for."""
    known = systems()
    return [p.title for group in PUBLISHED.values() for p in group if not any(n in known for n in p.names)]


def markdown() -> str:
    """docs/systems.md"""
    measured, known = measure.read(), systems()
    lines = [_INTRO.format(example="nar", about=measure.about() or "nothing yet")]
    placed: set[str] = set()
    for group, published in PUBLISHED.items():
        names = [n for p in published for n in p.names if n in known]
        placed |= set(names)
        lines += _section(group, [known[n] for n in names], measured) if names else []
    others = [s for s in known.values() if s.name not in placed]
    lines += _section("Bases and peers", others, measured) if others else []
    count = sum(len(group) for group in PUBLISHED.values())
    lines += [f"## Not done yet\n\nOf {count} published systems, {len(missing())}: {', '.join(missing())}."]
    return "\n".join(lines) + "\n"


def _section(title: str, members: list[System], measured: dict[str, Measured]) -> list[str]:
    rows = [
        f"## {title}",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'|'.join(['---'] * 3 + ['--:'] * 3 + ['---'] + ['--:'] * 3)}|",
    ]
    rows += [f"| {' | '.join(_cells(s, measured))} |" for s in members]
    notes = [
        f"- **{s.title}** (`{s.name}`): {s.mechanism}. {s.deviations[:1].upper() + s.deviations[1:]}".rstrip()
        for s in members
    ]
    return [*rows, "", *notes, ""]


def _cells(system: System, measured: dict[str, Measured]) -> list[str]:
    found = measured.get(system.name)
    cells = [system.title, system.paper, system.status]
    if found is None:
        return [*cells, *["-"] * 7]
    names, ways = [*found.ways], [*found.ways.values()]
    own, plain_name, plain = ways[0], names[-1], ways[-1]
    cells += [str(found.tokens), f"{own.passes:g}", f"{own.ms:.0f}"]
    if found.ratio is None:
        return [*cells, *["-"] * 4]
    return [*cells, plain_name, f"{plain.passes:g}", f"{plain.ms:.0f}", f"{found.ratio:.2f}x"]
