"""The list of systems, and a run of one: train, continue, sample, measure."""

import json
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.cli import main
from arimg.systems import find, measure, registry, systems, table
from arimg.systems.base import System
from arimg.systems.published import PUBLISHED


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures in two classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(20):
        path = folder / ("red" if i % 2 else "blue")
        path.mkdir(exist_ok=True)
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        pixels[:, :, 0 if i % 2 else 2] += 150
        Image.fromarray(pixels).save(path / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "var"
    arguments = ["systems", "train", "var", "--data", str(data), "--out", str(out), "--batch-size", "2"]
    assert main([*arguments, "--steps", "2"]) == 0
    return out


def test_every_system_has_facts_and_a_place_in_the_list() -> None:
    placed = {n for group in PUBLISHED.values() for p in group for n in p.names}
    assert sum(len(group) for group in PUBLISHED.values()) == 52
    for name, system in systems().items():
        assert name == system.name and system.title and system.mechanism
        assert not system.mechanism.endswith("."), system.name
        assert system.paper.startswith("arXiv "), system.name
    titles = table.missing()
    assert (
        len(titles) + sum(any(n in systems() for n in p.names) for g in PUBLISHED.values() for p in g) == 52
    )
    assert placed & set(systems())


def test_the_page_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "list", "--markdown"]) == 0
    page = Path(__file__).parent.parent / "docs" / "systems.md"
    assert page.read_text() == capsys.readouterr().out
    assert main(["systems", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in systems())


def test_the_status_says_whose_released_weights_load(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the table in docs/drop-in.md, whose tests load them by their names."""
    page = (Path(__file__).parent.parent / "docs" / "drop-in.md").read_text()
    documented = set(re.findall(r"`(systems\.\w+\.\w+)`", page))
    loading = {s for s in systems().values() if s.released}
    classes = [get_type_hints(system.make)["return"] for system in loading]
    assert {f"{c.__module__}.{c.__name__}" for c in classes} == {f"arimg.{name}" for name in documented}
    assert all(callable(c.from_state_dict) for c in classes)
    assert main(["systems", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for system in systems().values():
        line = lines[system.name]
        assert "trains, samples" in line
        assert ("loads released weights" in line) == system.released, line


def test_unknown_names_are_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown system 'lamagen'; did you mean llamagen"):
        find("lamagen")
    assert main(["systems", "sample", "var", "--run", "nowhere"]) == 2
    assert "no trained model in nowhere" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a family of"):
        System("x", "X", "sideways", "arXiv 1", "m", lambda i, f: None, lambda t, c: None)  # type: ignore[arg-type, return-value]


def test_a_run_trains_goes_on_and_samples(run: Path, data: Path, tmp_path: Path) -> None:
    trained = registry.load(run)
    assert trained.system.name == "var" and trained.classes == ("blue", "red")
    before = trained.model.state_dict()
    arguments = ["systems", "train", "var", "--data", str(data), "--out", str(run), "--batch-size", "2"]
    assert main([*arguments, "--steps", "4"]) == 0
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [s["from_step"] for s in steps if "from_step" in s] == [0, 2]
    after = registry.load(run).model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    grid = tmp_path / "grid.png"
    assert main(["systems", "sample", "var", "--run", str(run), "--n", "1", "-o", str(grid)]) == 0
    assert Image.open(grid).size[0] >= 2 * 64
    assert main(["systems", "sample", "var", "--run", str(run), "--class", "green", "-o", str(grid)]) == 2
    assert main(["systems", "sample", "llamagen", "--run", str(run), "-o", str(grid)]) == 2
    assert main(["systems", "sample", "var", "--run", str(run), "--previews", "-o", str(grid)]) == 2


def test_a_measurement_counts_passes_and_keeps_the_others(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    found = measure.measure(registry.load(run), pictures=1)
    first, *_ = found.ways.values()
    assert first.passes == 5 and found.tokens == 103 and first.ms > 0
    measure.write({"var": found}, "a machine", path)
    measure.write({"other": found}, "a machine, later", path)
    assert set(measure.read(path)) == {"var", "other"} and measure.about(path) == "a machine, later"
    arguments = ["systems", "bench", "var", "--runs", str(run.parent), "--n", "1", "--json", str(path)]
    assert main(arguments) == 0
    assert set(measure.read(path)) == {"var", "other"} and measure.about(path) == "a machine, later"
    assert main([*arguments, "--about", "another one"]) == 0 and measure.about(path) == "another one"
    assert main(["systems", "bench", "--runs", str(tmp_path)]) == 2
