"""The published systems, each a short composition of the parts of this package.

    arimg systems list
    arimg systems train nar --data photos.tar --out runs/nar
    arimg systems sample nar --out grid.png

A system is a module of this folder with a `SYSTEM`: its facts, how its tokenizer is made and how its model.
Models are `SystemModel`s: they turn pictures into examples, give a loss and open sessions for the generation
loop.
"""

from __future__ import annotations

from arimg.systems.base import System, SystemModel
from arimg.systems.registry import find, systems

__all__ = ["System", "SystemModel", "find", "systems"]
