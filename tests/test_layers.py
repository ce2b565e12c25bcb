"""The import directions of the house, read from the import statements (see CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package (longest match first) -> what of the project it may import
ALLOWED = {
    "envs": {"envs"},
    "jaxrl.agents": {
        "jaxrl.apart",
        "jaxrl.checks",
        "jaxrl.distributions",
        "jaxrl.draws",
        "jaxrl.networks",
        "jaxrl.normalize",
        "jaxrl.planning",
        "jaxrl.off_policy",
        "jaxrl.replay",
        "jaxrl.returns",
        "jaxrl.rollout",
        "jaxrl.spaces",
        "jaxrl.types",
    },
    "jaxrl.policy": {"jaxrl.agents", "jaxrl.normalize", "jaxrl.spaces", "jaxrl.types"},
    "jaxrl.off_policy": {
        "jaxrl.checks",
        "jaxrl.draws",
        "jaxrl.normalize",
        "jaxrl.prioritized",
        "jaxrl.replay",
        "jaxrl.rollout",
        "jaxrl.spaces",
        "jaxrl.types",
    },
    "jaxrl.prioritized": {"jaxrl.replay"},
    "jaxrl.replay": {"jaxrl.returns", "jaxrl.types"},
    "jaxrl.networks": {"jaxrl.distributions", "jaxrl.draws", "jaxrl.spaces"},
    "jaxrl.planning": {"jaxrl.checks"},
    "jaxrl.sharding": {"jaxrl.apart", "jaxrl.checks", "jaxrl.types"},
    "jaxrl.rollout": {"jaxrl.checks", "jaxrl.draws", "jaxrl.types"},
    "jaxrl.cost": {"jaxrl.checks", "jaxrl.cost"},
    "jaxrl.checkpoint": {"jaxrl.checks"},
    "jaxrl.apart": set(),
    "jaxrl.checks": set(),
    "jaxrl.distributions": {"jaxrl.draws"},
    "jaxrl.draws": set(),
    "jaxrl.normalize": set(),
    "jaxrl.returns": set(),
    "jaxrl.spaces": set(),
    "jaxrl.types": set(),
    "jaxrl": {"jaxrl.policy"},
    "train": {"jaxrl", "train"},
    "benchmarks": {"jaxrl", "train", "benchmarks"},
}
PROJECT = ("jaxrl", "envs", "train", "benchmarks", "tests")
# third parties that would make the library heavy or need an environment: lazily, or not at all
HEAVY = {
    "gymnax",
    "gymnasium",
    "matplotlib",
    "imageio",
    "tyro",
    "rich",
    "tensorboardX",
    "scipy",
    "pandas",
    "pynvml",
    "zeus",
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """Full names imported by a file, relative ones resolved; (name, outside of any function)."""
    tree = ast.parse(path.read_text())
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{full}.{alias.name}", id(node) not in inside


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def files() -> list[Path]:
    found = []
    for folder in ("jaxrl", "envs", "train", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "jaxrl" / "envs") not in path.parents:  # the link: seen as envs/
                found.append(path)
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    name = module_name(path)
    rule = max((p for p in ALLOWED if within(name, p)), key=len)
    allowed = ALLOWED[rule]
    for imported, _ in imports(path):
        if path == ROOT / "envs" / "__init__.py" and imported == "jaxrl.envs":
            continue  # makes `envs` and `jaxrl.envs` one module, see the file
        if within(imported, name) and name != "jaxrl":
            continue  # a package and its own parts
        if any(within(imported, p) for p in PROJECT):
            assert any(within(imported, p) for p in allowed), (
                f"{name} imports {imported}, but {rule} may import only {sorted(allowed)}"
            )
        if rule.startswith("jaxrl"):
            assert not within(imported, "jaxrl.envs"), f"{name} imports an environment"


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in files()
        if p.relative_to(ROOT).parts[0] in ("jaxrl", "envs") and p.parts[-2] != "render"
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_library_imports_no_heavy_third_party_at_its_top(path):
    name = module_name(path)
    heavy = HEAVY - ({"gymnax"} if name.startswith("envs") else set())
    for imported, at_top in imports(path):
        assert not (at_top and imported.split(".")[0] in heavy), f"{name} imports {imported}"


def test_agents_do_not_import_each_other():
    for path in (ROOT / "jaxrl" / "agents").glob("*.py"):
        for imported, _ in imports(path):
            assert not within(imported, "jaxrl.agents"), f"{path.name} imports {imported}"
