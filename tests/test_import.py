"""Both packages load without torch, and where there is no torch."""

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("package", ["jaxnorm", "interop"])
def test_import_loads_no_torch(package):
    loaded = run(f"import {package}, sys; print(sorted(m for m in sys.modules if m.partition('.')[0] == 'torch'))")
    assert loaded.stdout.strip() == "[]", loaded.stderr


@pytest.mark.parametrize("package", ["jaxnorm", "interop"])
@pytest.mark.parametrize("absent", [["torch"], ["torch", "torchvision", "timm", "huggingface_hub", "jaxtyping"]])
def test_import_works_without_optional_packages(package, absent):
    # None in sys.modules makes an import fail as if the package were not installed.
    imported = run(
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import {package}; print({package}.__doc__)"
    )
    assert imported.stdout.strip(), imported.stderr


def test_jaxnorm_does_not_import_interop():
    loaded = run("import jaxnorm, sys; print(sorted(m for m in sys.modules if m.partition('.')[0] == 'interop'))")
    assert loaded.stdout.strip() == "[]", loaded.stderr


def test_another_distribution_of_that_import_name_is_an_error(tmp_path):
    """PyPI's interop is Illumina's: its files and ours lie in one folder."""
    folder = tmp_path / "interop-1.4.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: interop\nVersion: 1.4.0\n")
    imported = run(f"import sys; sys.path.append({str(tmp_path)!r}); import interop")
    assert "ImportError: the distribution interop 1.4.0 (Illumina's InterOp)" in imported.stderr
    assert "two environments: pip uninstall interop jaxnorm" in " ".join(imported.stderr.split())
