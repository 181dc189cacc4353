"""Dependencies point one way, and what a serving process loads stays small."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "patune"
# What the modules of each part may import from patune: errors, workload and models are plain data for everyone.
DATA = {"errors", "workload", "models"}
ARROWS = {
    "__init__.py": {"kernels"},
    "__main__.py": {"cli"},
    "data": DATA,
    "cachedb": {"cachedb", *DATA},
    "kernels": {"kernels", "cachedb.lookup", *DATA},
    "tuner": {"tuner", "kernels", "cachedb", *DATA},
    "cli": {"cli", "tuner", "kernels", "cachedb", "__version__", *DATA},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names below patune that a module imports anywhere, also inside functions and under TYPE_CHECKING."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "patune":
            found |= {".".join([*node.module.split(".")[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "patune"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    """cli -> tuner -> kernels -> cachedb.lookup, and tuner -> cachedb; nothing imports cli."""
    part = path.relative_to(PACKAGE).parts[0]
    allowed = ARROWS["data" if path.stem in DATA else part]
    for name in imports_of(path):
        assert any(f"{name}.".startswith(f"{start}.") for start in allowed), f"imports patune.{name}"


def test_match_and_defaults_import_nothing_of_patune():
    """`export --to python` ships their text into other repos."""
    for name in ("cachedb/match.py", "kernels/defaults.py"):
        assert imports_of(PACKAGE / name) == set()
        modules = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert modules <= set(sys.stdlib_module_names)


def loaded_after(program: str) -> set[str]:
    """The top-level modules of a fresh process after a program."""
    env = {k: v for k, v in os.environ.items() if k != "PATUNE_DB"} | {"PYTHONPATH": str(PACKAGE.parent)}
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


TUNING = {"optuna", "sqlite_utils", "rich", "click", "sqlalchemy"}


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import patune; patune.__version__; dir(patune)", TUNING | {"torch", "triton", "numpy", "sqlite3"}),
        ("from patune.cachedb import lookup; lookup.table()", TUNING | {"torch", "triton", "numpy"}),
        (
            "import patune; patune.get_best_config('decode', head_dim=128, page_size=16, sm_count=132)",
            TUNING | {"torch", "triton"},
        ),
        ("import patune; patune.get_best_config('decode', head_dim=128, page_size=16)", TUNING | {"triton"}),
        ("import patune; patune.paged_decode; patune.paged_attention_with_cache; patune.merge_states", TUNING),
        ("import patune.kernels.registry as r; [r.template(name) for name in r.NAMES]", TUNING),
        ("import patune.tuner.compile, patune.tuner.worker", {"optuna", "sqlalchemy", "rich", "click"}),
        ("import patune.cli.main", {"torch", "triton", "optuna", "sqlalchemy"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fresh_process_loads_no_more_than_it_needs(program, absent):
    """Serving never loads the tuner's libraries, and `import patune` loads neither torch nor triton."""
    loaded = loaded_after(program)
    assert "patune" in loaded
    assert not loaded & absent


def test_decode_itself_loads_no_tuning_library():
    """A real call, config lookup included, in a process of its own."""
    program = """
import os, torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import patune
device = "cuda" if torch.cuda.is_available() else "cpu"
i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
q, kv = torch.ones(1, 1, 16, device=device), torch.ones(1, 2, 1, 4, 16, device=device)
assert patune.paged_decode(q, kv, i32(0), i32(0, 1), i32(4)).eq(1).all()
"""
    loaded = loaded_after(program)
    assert {"triton", "torch"} <= loaded and not loaded & TUNING


def test_every_public_name_is_there_and_nothing_else():
    """`patune.__all__`, the lazy table and the type checker's imports agree."""
    import patune

    assert set(patune.__all__) == set(patune._WHERE) <= set(dir(patune))
    for name in patune.__all__:
        assert getattr(patune, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'paged_encode'"):
        _ = patune.paged_encode
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed >= set(patune.__all__)
