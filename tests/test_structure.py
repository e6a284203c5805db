"""What the source tree promises: who imports whom, what is never loaded. The house is described in
docs/extending.md.
"""

import ast
import functools
import re
from pathlib import Path

from tests import flow_arrows
from tests.source_trees import nodes, tree

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("dnnlib", "torch_utils", "training", "eg3d_rlhf", "builders")
FLOORS = (  # from the ground; rooms of eg3d_rlhf by their own names. Nobody imports upwards
    "dnnlib",
    "torch_utils",
    "training",
    "core",
    "models geometry",
    "generators",
    "preferences experiments",
    "rewards measures photographs",
    "tuning people",
    "evaluation",
    "builders",
    "modes",
    "train tools benchmarks __main__",
    "tests",
)
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
TOPS = (*PACKAGES, "train", "tools", "benchmarks", "tests")
LAZY = {"matplotlib", "mcubes", "trimesh", "skimage", "captum", "umap", "diffusers", "transformers"}
LOADERS_THAT_RUN_CODE = {"dill", "cloudpickle", "joblib", "marshal", "shelve"}
MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:home|Users|root|work|mnt|scratch)/\w")


def sources(*tops: str) -> list[Path]:
    """Python files of packages, folders or top-level modules that exist."""
    found = []
    for top in tops or TOPS:
        found += (
            sorted((REPO / top).rglob("*.py"))
            if (REPO / top).is_dir()
            else [p for p in [REPO / f"{top}.py"] if p.exists()]
        )
    return found


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.level == 0 else []
    return []


def module_level(node: ast.AST):
    """Statements that run on import: everything outside functions, and outside `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from module_level(child)


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def modules() -> dict[str, Path]:
    """Everything but tests, by name."""
    return {module_of(path): path for path in sources() if module_of(path).split(".")[0] != "tests"}


def named(statements) -> set[str]:
    """Modules of ours that statements import; 'from package import module' counts, too."""
    names = {
        name
        for node in statements
        for module in imported(node)
        for name in (module, *(f"{module}.{a.name}" for a in node.names if isinstance(node, ast.ImportFrom)))
    }
    return {name for name in names if name in modules()}


@functools.cache
def needs() -> dict[str, set[str]]:
    """Module -> those of ours that it imports, also inside functions."""
    return {module: named(nodes(path)) for module, path in modules().items()}


def room_of(module: str) -> str:
    """Of eg3d_rlhf, else the top package."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "eg3d_rlhf" and rest else top


@functools.cache
def arrows() -> dict[tuple[str, str], set[str]]:
    """(room, another that it imports) -> the modules that do so."""
    users: dict[tuple[str, str], set[str]] = {}
    for module, other in ((module, other) for module, others in needs().items() for other in others):
        here = room_of(module)
        there = room_of(other)
        if here != there and "eg3d_rlhf" not in (here, there):
            users.setdefault((here, there), set()).add(module.removeprefix("eg3d_rlhf."))
    return users


def test_nobody_imports_upwards():
    assert {
        (module, there)
        for (here, there), users in arrows().items()
        for module in users
        if RANK[there] > RANK[here]
    } == set()
    level = [
        (here, there) for here, there in arrows() if RANK[here] == RANK[there] and (there, here) in arrows()
    ]
    assert level == [], "two rooms on one floor may import each other in one direction"


def test_nobody_imports_builders():
    """A wheel does not have them."""
    assert [users for (_, there), users in arrows().items() if there == "builders"] == []


def test_folders_of_flow_import_downwards():
    """And so few arrows are between them that the order can be kept in mind."""
    found = flow_arrows.arrows()
    assert flow_arrows.upward(found) == []
    assert len(found) <= flow_arrows.MOST, sorted(found)


# where hashlib is used and why; work is done once by its hash in experiments/store.py alone
HASHES = {
    "builders.face": "identity of the files in other people's wheels",
    "builders.features": "identity of the images that features were trained on",
    "eg3d_rlhf.core.cli": "file_hash, for everybody",
    "eg3d_rlhf.core.spec": "identity of what a reward reads",
    "eg3d_rlhf.experiments.logs": "a run's name in wandb and trackio",
    "eg3d_rlhf.experiments.store": "the store, and json_hash for everybody",
    "eg3d_rlhf.models.weights": "identity of tensors",
    "eg3d_rlhf.people.judge.calibration": "identity of a calibration, which labels of a judge state",
    "eg3d_rlhf.people.judge.judge": "identity of the images that a judge is sent",
    "eg3d_rlhf.people.judge.renders": "identity of a mesh in memory, and of its renders",
    "eg3d_rlhf.people.label.archive": "provenance of an imported table; which side is shown first",
    "eg3d_rlhf.people.label.assets.reading": "identity of an asset and its companion files",
    "eg3d_rlhf.people.label.assignments": "which annotator is given what, without a state",
    "eg3d_rlhf.people.label.preparation": "name of the file that states the progress of a campaign",
    "eg3d_rlhf.people.label.server.app": "content security policy, version of the page, ETag",
    "eg3d_rlhf.people.label.server.identity": "signed cookies",
    "eg3d_rlhf.people.label.server.served_shapes": "addresses that do not tell what is served",
    "eg3d_rlhf.people.label.shape_files": "names of prepared shapes, read while others are made",
    "eg3d_rlhf.people.label.store": "secrets of annotators",
    "eg3d_rlhf.people.study.design": "the design's own hash, which its answers state",
    "eg3d_rlhf.preferences.asset_votes": "which asset is first, and which pairs of scores are kept",
    "eg3d_rlhf.preferences.labels": "identity of labels",
    "eg3d_rlhf.tuning.flow.base.pairs": "a folder of pairs is whole",
    "eg3d_rlhf.tuning.flow.families.opening": "identity of a folder; splits of conditions",
    "eg3d_rlhf.tuning.flow.workspace.answers": "splits of conditions",
    "eg3d_rlhf.tuning.flow.workspace.work_folder": "splits of conditions",
    "torch_utils.build": "names of compiled ops",
    "training.distributed": "which process of torchrun reports an error",
    "training.heads.people_mesh": "cache of grids, below the store in the order of imports",
    "training.networks": "identity of a network",
    "training.phases": "derived seeds",
    "training.storage": "checksum in a file's header",
    "training.synthetic_heads": "name of a set of pictures, below the store in the order of imports",
}


def test_every_use_of_hashes_has_a_reason():
    users = {
        module
        for module, path in modules().items()
        if any("hashlib" in imported(node) for node in nodes(path))
    }
    assert users == set(HASHES)


def test_every_room_has_its_floor():
    assert {room_of(module) for module in modules() if module.startswith("eg3d_rlhf.")} <= RANK.keys()


def test_no_file_imports_itself_in_a_circle():
    """At import time: what is left when files that import nothing of the rest are taken
    away again and again.
    """
    left = {module: named(module_level(tree(path))) - {module} for module, path in modules().items()}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert sorted(left) == []


def test_heavy_packages_are_imported_inside_functions():
    wrong = [
        f"{name_of(path)}:{node.lineno} imports {module}"
        for path in sources(*PACKAGES, "train", "tools")
        for node in module_level(tree(path))
        for module in imported(node)
        if module.split(".")[0] in LAZY
    ]
    assert wrong == []


def test_only_judges_read_the_shape_features():
    features = "eg3d_rlhf.measures.shape_features"
    readers = {name for name, found in needs().items() if features in found}
    assert readers == {
        f"eg3d_rlhf.evaluation.{name}"
        for name in ("heads", "heldout_evaluators", "controlled_study.measurements")
    } | {"builders.shapes"}
    learners = ("preferences", "rewards", "tuning", "people")
    reached = {name for name in modules() if name.startswith(tuple(f"eg3d_rlhf.{room}" for room in learners))}
    front = {"eg3d_rlhf"}  # its names are imported when somebody outside asks for them
    while further := set().union(*(needs()[name] for name in reached)) - reached - front:
        reached |= further
    assert "eg3d_rlhf.tuning.gan.heldout_metrics" in reached and features not in reached
    text = [name for name in reached if "shape-features.safetensors" in modules()[name].read_text()]
    assert text == []


def runs_code(node: ast.AST) -> bool:
    """Whether a node unpickles, or loads or evaluates something that may run code."""
    if set(imported(node)) & LOADERS_THAT_RUN_CODE:
        return True
    if isinstance(node, ast.ImportFrom) and node.module == "pickle":
        return {alias.name for alias in node.names} != {"UnpicklingError"}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
        return node.attr != "UnpicklingError"  # torch.load(weights_only=True) raises it
    if not isinstance(node, ast.Call):
        return False
    if not isinstance(node.func, (ast.Name, ast.Attribute)):
        return any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
    call = ast.unparse(node.func)
    keywords = {
        k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("weights_only", "allow_pickle")
    }
    if call == "torch.load":
        return keywords.get("weights_only") != "True"
    return call in ("eval", "exec") or keywords.get("allow_pickle", "False") != "False"


# The child process that writes pickles with the classes of the user's checkout of EG3D.
PICKLES = "eg3d_rlhf/generators/pickles/pickle_in_checkout.py"


def test_nothing_that_is_loaded_can_run_code():
    files = [p for p in sources(*PACKAGES, "train", "tools", "benchmarks") if name_of(p) != PICKLES]
    assert [f"{name_of(p)}:{n.lineno}" for p in files for n in nodes(p) if runs_code(n)] == []
    # It writes pickles and reads none, and it knows nothing of this project.
    child = nodes(REPO / PICKLES)
    assert [ast.unparse(n) for n in child if runs_code(n)] == ["pickle.dump"]
    assert needs()[module_of(REPO / PICKLES)] == set()


def test_no_path_of_a_machine():
    patterns = ("*.md", "*.toml", "*.txt", "docs/**/*.md", "assets/*.json*", "Makefile")
    kept = sources() + [p for pattern in patterns for p in REPO.glob(pattern)]
    found = [
        f"{name_of(p)}:{i}"
        for p in kept
        for i, line in enumerate(p.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@functools.cache
def names_defined(path: Path) -> set[str]:
    """Names that a module has after import, as far as its text shows, and its submodules."""
    defined = {child.stem for child in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return defined


def imports_in_strings(path: Path):
    """Import statements in programs that a file holds as strings, such as those that tests start."""
    for node in nodes(path):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str) and " import " in node.value):
            continue
        for line in re.split(r"[\n;]", node.value):
            if re.match(r"\s*from (eg3d_rlhf|training|torch_utils|tests)[\w.]* import [\w, ]+$", line):
                yield node.lineno, ast.parse(line.strip()).body[0]


def test_programs_in_strings_import_what_exists():
    wrong = []
    for path in sources("tests", "eg3d_rlhf"):
        for line, statement in imports_in_strings(path):
            module = REPO / statement.module.replace(".", "/")
            file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            known = names_defined(file) if file.exists() else set()
            lazy = file.exists() and "__getattr__" in known
            wrong += [
                f"{name_of(path)}:{line}: {statement.module}: {alias.name}"
                for alias in statement.names
                if alias.name not in known and not lazy
            ]
    assert wrong == []
