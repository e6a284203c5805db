"""Which of the five packages of tuning/flow imports which."""

from tests.test_structure import needs

PACKAGE = "eg3d_rlhf.tuning.flow."
BELOW = {  # what a package may import
    "base": set(),
    "training": {"base"},
    "families": {"base"},
    "toy": {"base", "families"},
    "workspace": {"base", "training", "families"},
}


def package_of(module: str) -> str:
    return module.removeprefix(PACKAGE).split(".")[0]


def test_packages_import_those_below_alone():
    arrows = {
        (module, other)
        for module, others in needs().items()
        for other in others
        if module.startswith(PACKAGE) and other.startswith(PACKAGE)
    }
    assert {package_of(module) for module, _ in arrows} <= BELOW.keys()
    wrong = {
        (module, other)
        for module, other in arrows
        if package_of(other) not in BELOW[package_of(module)] | {package_of(module)}
    }
    assert wrong == set()
