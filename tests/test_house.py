"""The house keeps its promises: docs name what exists, the README's commands run, public names are pinned."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import wemm

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "training").rglob("*.md")])


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_name_paths_that_exist(doc):
    """Every `src/…`, `tests/…`, `docs/…`, `examples/…`, `training/…` in backticks, and every relative link."""
    text = doc.read_text(encoding="utf-8")
    named = re.findall(r"`((?:src|tests|docs|examples|training)/[\w./-]+)`", text)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [link for link in linked if not (doc.parent / link).exists()]
    assert missing == []


def _tree():
    """(indent, name) of every entry in the README's tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## The tree")[1].split("```")[1]
    for line in block.strip().splitlines():
        match = re.match(r"^([│ ]*)[├└]── ([\w./]+)", line)
        assert match, line
        yield len(match[1]) // 4, match[2]


def test_the_tree_of_the_readme_is_the_tree():
    """Every entry exists, and every module of the package stands in it by file or by directory."""
    listed, parents = set(), {}
    for depth, name in _tree():
        path = parents.get(depth - 1, ROOT) / name
        parents[depth] = path
        assert path.exists(), path
        listed.add(path)
    leaves = {path for path in listed if path.is_dir() and not any(p.parent == path for p in listed)}
    for module in (ROOT / "src/wemm").rglob("*.py"):
        covered = module in listed or any(leaf in module.parents for leaf in leaves)
        exempt = module.name in ("__init__.py", "__main__.py")
        assert covered or exempt, f"{module} is not in the README's tree"


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_commands_of_the_readme_run(readme, tmp_path):
    """Every `wemm …` line, with the bundled checkpoint and the demo image in place of the user's own."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    lines = [line[2:].split("#")[0] for line in re.findall(r"^\$ .*$", text, re.MULTILINE)]
    commands = [shlex.split(line) for line in lines if line.startswith("wemm ")]
    assert len(commands) == 3
    for command in commands:
        replaced = [{"/data/WeMM-Chat-2k-CN": "nano", "invoice.jpg": str(ROOT / "docs/images/demo.png")}.get(a, a)
                    for a in command[1:]]  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-m", "wemm", *replaced], cwd=tmp_path, input="", capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    targets = [shlex.split(line)[1] for line in lines if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_python_example_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("/data/WeMM-Chat-2k-CN", "nano").replace("invoice.jpg", str(ROOT / "docs/images/demo.png"))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            "docs/python.md",
            ["How many circles are there? 3", "What colour is the star? blue", "1 of 3 images encoded"],
        ),
        ("docs/python.zh.md", ["图中有几个圆形？ 3", "星形是什么颜色的？ 蓝色"]),
    ],
)
def test_the_python_pages_run_from_top_to_bottom(page, expected):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", "".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in expected:
        assert line in result.stdout


def test_public_names_are_pinned():
    assert wemm.__all__ == [
        "LLM", "AsyncLLM", "BeamSearchParams", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput",
        "SamplingParams", "StructuredOutputsParams", "WemmError", "__version__",
    ]  # fmt: skip
    assert all(getattr(wemm, name) is not None for name in wemm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        wemm.Nonsense


def test_the_version_is_one():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{wemm.__version__}"' in pyproject
    assert f"## {wemm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_error_tree_is_drawn_as_it_is():
    """errors.py draws its classes with their indentation: the drawing matches the inheritance."""
    from wemm import errors

    drawn = re.findall(r"^([│├└─ ]*)(\w+Error)", errors.__doc__, re.MULTILINE)
    stack: list[str] = []
    for prefix, name in drawn:
        depth = len(prefix) // 4
        stack[depth:] = [name]
        if depth:
            assert getattr(errors, name).__base__ is getattr(errors, stack[depth - 1]), name
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name for _, name in drawn} == classes


def test_a_forbidden_import_is_caught(tmp_path):
    """The guard of `make check`: a model that imports the engine breaks the import contract."""
    import shutil

    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("bundled", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    offender = tmp_path / "src/wemm/model/batch.py"
    offender.write_text(offender.read_text() + "\nimport wemm.engine.scheduler\n")
    script = (
        "import sys; sys.path.insert(0, 'src'); sys.meta_path[:] = "
        "[f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "wemm.model is not allowed to import wemm.engine" in result.stdout
