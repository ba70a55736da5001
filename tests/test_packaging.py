"""The folders at the root, the wheel, and who may import whom (docs/adr/0001-layout.md)."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "pipelines", "eval", "demo")

# What each part may import of ours.  `sparsediff.block_mask` and `token_grid` are geometry, open to all.
LAYERS = {
    "kernels": {"kernels"},
    "pipelines": {"pipelines", "core", "kernels"},
    "core": {"core", "kernels"},
    "eval": {"eval", "pipelines", "core", "kernels"},
    "demo": {"demo", "eval", "pipelines", "core", "kernels"},
}


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_not_importable_as_regular_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would shadow a library of that name"
    )


def test_the_root_holds_only_what_was_agreed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    folders = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= {*MAPPED, "sparsediff", "tests", "docs"}


def test_the_wheel_holds_every_module_and_weight(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-qw",
            tmp_path,
            ROOT,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    expected = {
        f"sparsediff/{p.relative_to(ROOT)}" for f in MAPPED for p in (ROOT / f).rglob("*.py")
    }
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "sparsediff").rglob("*.py")}
    expected |= {
        f"sparsediff/{p.relative_to(ROOT)}" for p in (ROOT / "kernels/configs").glob("*.json")
    }
    data = [*(ROOT / "eval/suites").glob("*.json"), *(ROOT / "eval/report_assets").glob("*")]
    data += [
        p
        for name in ("assets", "example")
        for p in (ROOT / "demo" / name).rglob("*")
        if p.is_file()
    ]
    expected |= {f"sparsediff/{p.relative_to(ROOT)}" for p in data}
    weights = ROOT / "pipelines/tiny/weights"
    expected |= {f"sparsediff/{p.relative_to(ROOT)}" for p in weights.rglob("*") if p.is_file()}
    assert shipped == expected | {"sparsediff/py.typed"}


@pytest.mark.parametrize("start", [["-c"], ["-m"]], ids=["-c", "-m"])
def test_sub_packages_import_from_the_root_and_elsewhere(start, tmp_path):
    code = [
        "-c",
        "import sparsediff.kernels.attention, sparsediff.pipelines.wan, sparsediff.eval.cli",
    ]
    module = ["-m", "sparsediff.eval", "--version"]
    for folder in (ROOT, tmp_path):
        subprocess.run(
            [sys.executable, *(code if start == ["-c"] else module)],
            cwd=folder,
            check=True,
            capture_output=True,
        )


def test_another_library_named_kernels_wins_in_the_root(tmp_path):
    """Hugging Face's `kernels`, as any package on the path: our folder of that name must not come before it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True\n")
    code = "import kernels, sparsediff; from sparsediff.kernels import attention; print(kernels.theirs)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "True"


def test_imports_point_one_way():
    wrong = []
    for part in LAYERS:
        folder = ROOT / ("sparsediff" if part == "core" else part)
        for path in folder.rglob("*.py"):
            for target in _imports(path):
                owner = next((f for f in MAPPED if target.startswith(f"sparsediff.{f}")), "core")
                if part == "kernels" and target.startswith("sparsediff.block_mask"):
                    continue
                if path.name == "__init__.py" and part == "core":
                    continue  # the door names everything, lazily
                if owner not in LAYERS[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("sparsediff")
        ):
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("sparsediff"))
