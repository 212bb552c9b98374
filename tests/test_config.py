"""Loading: what is loaded is said, what cannot load is explained, and nothing passes silently."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import arimg
from arimg import _library


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


def test_show_config_names_what_runs():
    text = arimg.show_config()
    assert arimg.__version__ in text
    assert f"SIMD level   {_library.simd_level()}" in text
    assert "operators    loaded" in text


def test_a_missing_library_is_said_once_and_the_reference_runs(tmp_path):
    code = (
        "import arimg, torch\n"
        "x = torch.randn(1, 2, 8); m = torch.zeros(1, 1, 8)\n"
        "for _ in range(3): y = arimg.ops.norm_modulate(x, m, m)\n"
        "assert torch.equal(y, arimg.reference.norm_modulate(x, m, m))\n"
        "print(arimg.show_config())"
    )
    done = python(code, ARIMG_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("runs without its compiled operators") == 1
    assert "_ops.so is not in" in done.stderr
    assert "NOT LOADED" in done.stdout and "_ops.so is not in" in done.stdout


def test_a_broken_library_gives_the_loaders_own_words(tmp_path):
    (tmp_path / "_ops.so").write_bytes(b"not a library")
    done = python("import arimg; print(arimg.show_config())", ARIMG_LIBRARY_DIR=str(tmp_path))
    assert "NOT LOADED" in done.stdout and ("invalid ELF header" in done.stdout or "too short" in done.stdout)


def test_a_library_older_than_the_code_is_said():
    from arimg.ops._common import fake

    with pytest.raises(
        ImportError, match=r"older than this Python code .* arimg::not_an_operator\): build again"
    ):
        fake("not_an_operator")(lambda x: x)
    _library._hooks.pop()


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(_library.torch, "__version__", "2.9.1+cpu")
    with pytest.raises(OSError, match=r"need torch >= 2.10 .* got torch 2.9.1"):
        _library._load_shared("_ops")


@pytest.mark.parametrize("level", _library.simd_levels())
def test_the_simd_level_comes_from_the_environment(level):
    done = python("from arimg import _library; print(_library.simd_level())", ARIMG_SIMD_LEVEL=level)
    assert done.stdout.strip() == level


def test_an_unknown_or_missing_simd_level_is_said():
    done = python("from arimg import _library; print(_library.simd_level())", ARIMG_SIMD_LEVEL="sse9")
    assert "expected scalar, avx2 or avx512, got sse9" in done.stderr
    assert done.stdout.strip() == _library.simd_levels()[-1]
    with pytest.raises(ValueError, match="expected a SIMD level of scalar, avx2, avx512, got 'neon'"):
        _library.set_simd_level("neon")
    if "avx512" not in _library.simd_levels():
        with pytest.raises(ValueError, match="expected a SIMD level that runs here"):
            _library.set_simd_level("avx512")


def test_host_module_and_layout_agree_on_intervals():
    from arimg.layout import Layout

    layout = Layout.scales((1, 2, (2, 3)))
    for rule in ("token-causal", "level-causal", "level-diagonal", "full"):
        start, end = _library.host().row_intervals(list(layout.sizes), rule)
        expected_start, expected_end = layout.intervals(rule)
        assert start.tolist() == expected_start.tolist() and end.tolist() == expected_end.tolist()
    with pytest.raises(ValueError, match="expected rule token-causal"):
        _library.host().row_intervals([1], "diagonal")
