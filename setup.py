"""Compiles the ops ahead of time where that is asked for; everything else about the package stands in
pyproject.toml.

    python setup.py build_ops                                     for this checkout
    EG3D_RLHF_BUILD_OPS=1 pip install --no-build-isolation .      into the package that is installed

torch.utils.cpp_extension does the work, with ninja where it is installed (pip install 'eg3d-rlhf[ops]').
Otherwise nothing is compiled at install: every op is compiled on first use (torch_utils/build.py, which finds
what was compiled here by the same name).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

VARIABLE = "EG3D_RLHF_BUILD_OPS"
ROOT = Path(__file__).resolve().parent


def extensions(only: list[str]) -> tuple[list, type[Command]]:
    """An extension module for each op and device that this machine can compile, and the command that builds
    them.
    """
    sys.path.insert(0, str(ROOT))
    try:
        from torch.utils import cpp_extension

        from torch_utils import build
    except ImportError as error:
        sys.exit(
            f"{VARIABLE}: expected torch where the ops are compiled, got none: {error}. Use pip install"
            " --no-build-isolation."
        )
    makers = {"cpu": cpp_extension.CppExtension}
    if cpp_extension.CUDA_HOME is not None and build.torch.version.cuda is not None:
        makers["cuda"] = cpp_extension.CUDAExtension
    made = []
    for device, make in makers.items():
        for op in [op for op in build.ops(device) if not only or op in only]:
            flags = {
                "cxx" if device == "cpu" else "nvcc": [
                    "-g0" if device == "cpu" else "-O3",
                    *build.flags(device),
                ]
            }
            source = (build.SOURCES / f"{op}{build.SUFFIX[device]}").relative_to(ROOT)
            name = f"torch_utils.ops.ahead.{build.prebuilt_library(op, device).stem}"
            made.append(
                make(
                    name,
                    [str(source)],
                    include_dirs=[str(build.SOURCES)],
                    extra_compile_args=flags,
                    extra_link_args=["-fopenmp"] if "-fopenmp" in build.flags(device) else [],
                    py_limited_api=True,
                )
            )
    ninja = cpp_extension.is_ninja_available()
    return made, cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=ninja)


class BuildOps(Command):
    """Compile the ops and put them where torch_utils/build.py looks."""

    description = "compile the ops ahead of time"
    user_options = [("only=", None, "ops, comma-separated; all unless given")]

    def initialize_options(self) -> None:
        """Nothing is left out."""
        self.only = ""

    def finalize_options(self) -> None:
        """The list, split."""
        self.names = [name.strip() for name in self.only.split(",") if name.strip()]

    def run(self) -> None:
        """Build in a temporary folder, then move each library to its name."""
        self.distribution.ext_modules, self.distribution.cmdclass["build_ext"] = extensions(self.names)
        from torch_utils import build

        with tempfile.TemporaryDirectory() as folder:
            command = self.get_finalized_command("build_ext")
            command.build_lib = folder
            command.build_temp = os.path.join(folder, "objects")
            command.inplace = False
            command.run()
            target = build.prebuilt_folder()
            target.mkdir(parents=True, exist_ok=True)
            for library in Path(folder, "torch_utils", "ops", "ahead").glob("*.so"):
                partial = target / f"{library.name}.part"
                shutil.copyfile(library, partial)
                os.replace(partial, target / library.name)  # it appears under its name only when it is whole
                print(target / library.name)


class BuildPackages(build_py):
    """The packages, and what is bundled beside them in a checkout: a wheel has assets/ in eg3d_rlhf/."""

    def run(self) -> None:
        """Copy both; an editable install reads the checkout's own."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "assets", Path(self.build_lib, "eg3d_rlhf", "assets"), dirs_exist_ok=True)


if __name__ == "__main__":
    wanted = os.environ.get(VARIABLE, "0") not in ("", "0")
    modules, build_ext = extensions([]) if wanted else ([], None)
    commands = {
        "build_ops": BuildOps,
        "build_py": BuildPackages,
        **({"build_ext": build_ext} if build_ext else {}),
    }
    setup(ext_modules=modules, cmdclass=commands)
