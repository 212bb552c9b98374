"""The fifty-two published systems that this package is for, by group, and which of our systems stand for
each.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """title: as its authors call it; names: our systems (`arimg.systems.find`), none where it is not done
    yet.
    """

    title: str
    names: tuple[str, ...] = ()


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "Next-scale and next-frequency": (
        Published("VAR", ("var",)),
        Published("FlexVAR", ("flexvar",)),
        Published("M-VAR", ("mvar",)),
        Published("NFIG", ("nfig",)),
        Published("HMAR", ("hmar",)),
        Published("STAR", ("star",)),
        Published("TokenFlow", ("tokenflow",)),
        Published("NSARM (its base)", ("infinity",)),
    ),
    "Raster and any-order": (
        Published("NAR", ("nar",)),
        Published("CTF", ("ctf",)),
        Published("ELM", ("elm",)),
        Published("Token-Shuffle", ("token-shuffle",)),
        Published("VF prompt", ("vf-prompt",)),
        Published("JPEG-LM", ("jpeg-lm",)),
        Published("Lumina-mGPT", ("lumina-mgpt",)),
        Published("DetailFlow", ("detailflow",)),
        Published("Meissonic", ("meissonic",)),
        Published("X-Omni"),
        Published("Hi-MAR"),
    ),
    "Speculative and fast sampling, distillation": (
        Published("Lumina-mGPT 2.0 and speculative Jacobi decoding", ("sjd", "scd")),
        Published("GSD", ("gsd",)),
        Published("DD1", ("dd1",)),
        Published("CSpD"),
        Published("DD2"),
        Published("DiSA"),
    ),
    "Tokenizers and token designs": tuple(
        map(Published, ("GigaTok", "RobusTok", "Hita", "FlexTok", "D-AR", "DiGIT", "DQ-Transformer"))
    ),
    "Continuous heads and flow": tuple(map(Published, ("FlowAR", "xAR", "ARFlow", "E-CAR"))),
    "Conditioning and editing": tuple(map(Published, ("ControlAR", "ECM", "VAREdit", "CoTyle"))),
    "Training objectives and post-training": tuple(
        map(Published, ("ARRA", "ASVR", "EAR", "Hyperfitting", "Image-Generation-CoT / PARM"))
    ),
    "Watermarks, detection, evaluation": tuple(
        map(Published, ("LBW", "IndexMark", "DDA", "VTBench", "Survey"))
    ),
    "Outside autoregression": tuple(map(Published, ("GALIP", "Re-Imagen"))),
}
