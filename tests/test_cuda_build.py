"""Choice of CUDA architectures by setup.py and CMake; no nvcc needed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.test_install import ROOT

MODULE = ROOT / "csrc" / "cuda" / "architectures.cmake"


def tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def build(tmp_path):
    """Runs setup.py with an nvcc that does nothing and a cmake that records its arguments and writes empty modules."""
    tool(tmp_path, "nvcc", "#!/bin/sh\n")
    tool(tmp_path, "ninja", "#!/bin/sh\n")
    tool(
        tmp_path,
        "cmake",
        f"""#!{sys.executable}
import pathlib, sys
if "--build" in sys.argv:
    target = sys.argv[sys.argv.index("--target") + 1]
    folder = pathlib.Path("{tmp_path}/output").read_text()
    pathlib.Path(folder, target + "{sysconfig.get_config_var("EXT_SUFFIX")}").touch()
else:
    options = dict(a.split("=", 1) for a in sys.argv if a.startswith("-D"))
    pathlib.Path("{tmp_path}/output").write_text(options["-DCMAKE_LIBRARY_OUTPUT_DIRECTORY"])
    pathlib.Path("{tmp_path}/arguments").write_text("\\n".join(sys.argv))
""",
    )

    def run(**environment):
        command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/t"]
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DECO_KERNELS_BUILD": "cuda"}
        (tmp_path / "lib" / "deco_kernels").mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **path, **environment}, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return (tmp_path / "arguments").read_text().split("\n")

    return run


def test_the_architectures_are_chosen_by_the_environment(build):
    assert "-DDECO_CUDA_ARCHS=90a;120+PTX" in build(DECO_KERNELS_CUDA_ARCHS="90a, 120+PTX")


def test_without_a_choice_an_earlier_one_is_forgotten(build):
    arguments = build(DECO_KERNELS_CUDA_ARCHS="")
    assert "-UDECO_CUDA_ARCHS" in arguments and "-DDECO_CUDA=ON" in arguments
    assert not [argument for argument in arguments if argument.startswith("-DDECO_CUDA_ARCHS")]


def test_objects_are_kept_where_the_environment_says(build, tmp_path):
    assert f"-B{tmp_path}/objects/_native_cuda" in build(DECO_KERNELS_BUILD_DIR=f"{tmp_path}/objects")


def gencode(tmp_path, architectures, version):
    """Result of CMake for a list of architectures and a version of nvcc."""
    beside = str(Path(sys.executable).parent)
    script = tmp_path / "script.cmake"
    lines = (
        f'include("{MODULE}")',
        f'deco_cuda_gencode(options "{architectures}" {version})',
        'message("OPTIONS=${options}")',
    )
    script.write_text("\n".join(lines))
    return subprocess.run(
        ["cmake", "-P", script],
        env=os.environ | {"PATH": f"{os.environ['PATH']}:{beside}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("version", ["12.8", "13.0.88"])
def test_a_recent_nvcc_builds_for_all_architectures(tmp_path, version):
    result = gencode(tmp_path, "80+PTX;90a;100;120", version)
    codes = ("arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80")
    codes += tuple(f"arch=compute_{number},code=sm_{number}" for number in ("90a", "100", "120"))
    assert f"OPTIONS={';'.join(f'-gencode={code}' for code in codes)}\n" in result.stderr
    assert "Warning" not in result.stderr


def test_an_old_nvcc_leaves_out_what_it_cannot_build_for(tmp_path):
    result = gencode(tmp_path, "90a;100;120", "12.6")
    assert result.returncode == 0 and "OPTIONS=-gencode=arch=compute_90a,code=sm_90a\n" in result.stderr
    for number in (100, 120):
        said = f"CUDA 12.6 cannot build for sm_{number} (that needs 12.8); left out"
        assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("architectures", "said"), [("100", "no architecture is left"), ("hopper", "expected numbers like 80, 90a")]
)
def test_what_cannot_be_built_is_an_error(tmp_path, architectures, said):
    result = gencode(tmp_path, architectures, "12.6")
    assert result.returncode != 0 and said in " ".join(result.stderr.split())
