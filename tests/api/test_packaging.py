"""The build's decisions and the loading of the native module: no compiler runs here, and nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from build_native import compile, resources, toolkit
from build_native.toolkit import Architecture, BuildError
from fused_sepconv.native import loader, sources

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]

PTXAS_OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4axpyIfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4axpyIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 512 bytes smem, 592 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 16.126 ms
ptxas info    : Function properties for _Z6helperv
    96 bytes stack frame, 96 bytes spill stores, 96 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4axpyIfEvPT_' for 'sm_90a'
ptxas info    : Function properties for _Z6helperv
    96 bytes stack frame, 96 bytes spill stores, 96 bytes spill loads
ptxas info    : Function properties for _Z4axpyIfEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_toolkit(
    root: Path, include: str = "include", library: str = "lib64", release: str = "12.8", options: str = ""
) -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc answers what a build asks."""
    answers = f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.93" ;;
  --help) echo "{options}" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
  --dryrun) echo "#$ _SPACE_= " >&2; echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
esac
"""
    executable(root / "bin" / "nvcc", answers)
    for file in (root / include / "cuda_runtime.h", root / library / "libcudart_static.a"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def test_the_sources_digest_changes_with_contents_names_and_new_files_of_what_is_compiled(tmp_path: Path) -> None:
    for name in ("params.h", "launch/one.cu", "kernels/one.cuh", "bindings.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seen = [sources.digest(tmp_path)]
    for change in (
        lambda: (tmp_path / "params.h").write_text("other"),
        lambda: (tmp_path / "params.h").rename(tmp_path / "renamed.h"),
        lambda: (tmp_path / "kernels" / "two.cuh").touch(),
    ):
        change()
        seen.append(sources.digest(tmp_path))
    assert len(set(seen)) == 4
    (tmp_path / "README.md").write_text("prose")
    assert sources.digest(tmp_path) == seen[-1] == compile.sources_digest(tmp_path)  # setup and package agree


class TestArchitectures:
    def test_default_is_what_nvcc_knows_with_portable_code_for_every_newer_gpu(self) -> None:
        chosen = toolkit.choose_architectures({}, {75, 80, 86, 90, 100, 110, 120, 121})
        assert ";".join(map(str, chosen)) == "80;90;100+PTX;120"
        assert ";".join(map(str, toolkit.choose_architectures({}, {80, 90}))) == "80;90+PTX"

    @pytest.mark.parametrize("text", ["80;90a+PTX", "80,90a+PTX", " 8.0; 9.0A+ptx;", "80;90a+PTX;80"])
    def test_spellings(self, text: str) -> None:
        chosen = toolkit.choose_architectures({"FUSED_SEPCONV_ARCHS": text}, {80, 90})
        assert chosen == [Architecture("80"), Architecture("90a", ptx=True)]

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("8.0;9.0+PTX", "80;90+PTX"),
            ("7.5 8.0 9.0+PTX", "80;90+PTX"),
            ("7.0;8.0,9.0", "80;90"),
            ("Ampere;Hopper+PTX", "80;86;90+PTX"),
            ("", "80;90+PTX"),
            (" ", "80;90+PTX"),
        ],
    )
    def test_pytorchs_list_is_taken_where_ours_is_not_set(self, text: str, expected: str) -> None:
        chosen = toolkit.choose_architectures({"TORCH_CUDA_ARCH_LIST": text}, {80, 86, 90})
        assert ";".join(map(str, chosen)) == expected
        environ = {"TORCH_CUDA_ARCH_LIST": text, "FUSED_SEPCONV_ARCHS": "86"}
        assert toolkit.choose_architectures(environ, {80, 86, 90}) == [Architecture("86")]

    @pytest.mark.parametrize(
        "text, message",
        [
            ("Common", "TORCH_CUDA_ARCH_LIST: 'Common' is no architecture"),
            ("Hopper;12.0", "TORCH_CUDA_ARCH_LIST: this nvcc does not know 120; it knows 80, 90"),
            ("7.0;7.5", "TORCH_CUDA_ARCH_LIST is '7.0;7.5', but the kernels need 80 or newer"),
        ],
    )
    def test_what_of_pytorchs_list_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(BuildError, match=message):
            toolkit.choose_architectures({"TORCH_CUDA_ARCH_LIST": text}, {80, 90})

    def test_ptx_is_of_the_plain_architecture(self) -> None:
        flags = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
        assert Architecture("90a", ptx=True).flags() == flags

    @pytest.mark.parametrize(
        "text, known, message",
        [
            *(
                (text, {80}, r"is no architecture.*never asks for a GPU")
                for text in ("native", "sm_80", "80+SASS", "8")
            ),
            ("80;120", {80, 90}, r"does not know 120; it knows 80, 90"),
            ("", {70}, r"knows none of 80, 90, 100, 120"),
        ],
    )
    def test_what_is_refused(self, text: str, known: set[int], message: str) -> None:
        with pytest.raises(BuildError, match=message):
            toolkit.choose_architectures({"FUSED_SEPCONV_ARCHS": text} if text else {}, known)


class TestToolkitSearch:
    def test_order(self, tmp_path: Path) -> None:
        home, path, conventional, on_path = (
            make_toolkit(tmp_path / name) for name in ("home", "path", "usual", "nvcc")
        )
        environ = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": str(on_path / "bin")}
        for variable, expected in (("CUDA_HOME", home), ("CUDA_PATH", path)):
            assert toolkit.find_toolkit(environ, conventional).nvcc == expected / "bin" / "nvcc"
            del environ[variable]
        assert toolkit.find_toolkit(environ, conventional).nvcc == conventional / "bin" / "nvcc"
        assert toolkit.find_toolkit(environ, tmp_path / "absent").nvcc == on_path / "bin" / "nvcc"

    def test_incomplete_places_are_passed_over(self, tmp_path: Path) -> None:
        headless = make_toolkit(tmp_path / "headless")
        (headless / "include" / "cuda_runtime.h").unlink()
        conventional = make_toolkit(tmp_path / "usual")
        found = toolkit.find_toolkit({"CUDA_HOME": str(headless), "PATH": ""}, conventional)
        assert found.include == conventional / "include"

    def test_one_that_is_too_old_is_passed_over(self, tmp_path: Path) -> None:
        old = make_toolkit(tmp_path / "old", release="11.8")
        with pytest.raises(LookupError, match=r"the conventional place: .*old has nvcc 11\.8, older than 12\.1"):
            toolkit.find_toolkit({"PATH": ""}, old)
        oldest = make_toolkit(tmp_path / "oldest", release="12.1")
        found = toolkit.find_toolkit({"CUDA_HOME": str(old), "PATH": ""}, oldest)
        assert found.nvcc == oldest / "bin" / "nvcc"

    def test_layouts_of_other_distributions(self, tmp_path: Path) -> None:
        root = make_toolkit(tmp_path, include="targets/sbsa-linux/include", library="targets/sbsa-linux/lib")
        found = toolkit.Toolkit.at(root)
        assert (found.include, found.library) == (root / "targets/sbsa-linux/include", root / "targets/sbsa-linux/lib")
        assert found.version() == "12.8" and found.known_architectures() == {80, 90, 100}  # as its nvcc says

    @pytest.mark.parametrize("kind", ["link", "script"])
    def test_nvcc_on_path_may_be_a_link_or_a_script(self, tmp_path: Path, kind: str) -> None:
        nvcc, other = make_toolkit(tmp_path / "real") / "bin" / "nvcc", tmp_path / "bin" / "nvcc"
        if kind == "link":
            other.parent.mkdir()
            other.symlink_to(nvcc)
        else:
            executable(other, f'#!/bin/sh\nexec {nvcc} "$@"\n')
        environ = {"PATH": os.pathsep.join([str(other.parent), os.defpath])}
        assert toolkit.find_toolkit(environ, tmp_path / "absent").nvcc == nvcc

    def test_a_script_to_nowhere_is_no_toolkit(self, tmp_path: Path) -> None:
        executable(tmp_path / "bin" / "nvcc", '#!/bin/sh\nexec /nowhere/bin/nvcc "$@"\n')
        with pytest.raises(LookupError, match=r"no CUDA toolkit found \(CUDA_HOME: none; .*where nvcc on PATH leads"):
            toolkit.find_toolkit({"PATH": str(tmp_path / "bin")}, tmp_path / "absent")


class TestSwitch:
    """FUSED_SEPCONV_CUDA, with and without a toolkit."""

    def test_unset_takes_what_is_there_and_0_leaves_the_kernels_out(self, tmp_path: Path) -> None:
        found, reason = toolkit.choose_toolkit({"PATH": ""}, tmp_path)
        assert found is None and reason.startswith("no CUDA toolkit found (") and "\n" not in reason
        found, reason = toolkit.choose_toolkit({"PATH": ""}, make_toolkit(tmp_path))
        assert found is not None and reason == ""
        environ = {"FUSED_SEPCONV_CUDA": "0", "PATH": ""}
        assert toolkit.choose_toolkit(environ, tmp_path) == (None, "FUSED_SEPCONV_CUDA=0")

    def test_1_insists_and_lists_the_remedies_and_other_values_are_refused(self, tmp_path: Path) -> None:
        insisting = {"FUSED_SEPCONV_CUDA": "1", "PATH": ""}
        with pytest.raises(BuildError, match=r"(?s)no CUDA toolkit found.*Remedies: set CUDA_HOME.*install one.*unset"):
            toolkit.choose_toolkit(insisting, tmp_path)
        old = make_toolkit(tmp_path, release="12.0")  # is like none
        found, reason = toolkit.choose_toolkit({"PATH": ""}, old)
        assert found is None and "nvcc 12.0, older than 12.1" in reason
        with pytest.raises(BuildError, match=r"FUSED_SEPCONV_CUDA=1, but .*nvcc 12\.0, older than 12\.1.*Remedies"):
            toolkit.choose_toolkit(insisting, old)
        with pytest.raises(BuildError, match="FUSED_SEPCONV_CUDA must be 0 or 1 or unset, not 'yes'"):
            toolkit.choose_toolkit({"FUSED_SEPCONV_CUDA": "yes"})


class TestNinjaFile:
    def test_max_jobs(self) -> None:
        assert compile.jobs({"MAX_JOBS": "16"}) == 16
        assert compile.jobs({}) == os.cpu_count()
        for text in ("0", "-1", "many"):
            with pytest.raises(BuildError, match="MAX_JOBS must be a positive whole number"):
                compile.jobs({"MAX_JOBS": text})

    def test_one_edge_a_source_and_pybind11_for_the_binding_alone(self, tmp_path: Path) -> None:
        found = toolkit.Toolkit.at(make_toolkit(tmp_path / "toolkit"))
        csrc = tmp_path / "a folder" / "csrc"
        (csrc / "launch").mkdir(parents=True)
        (csrc / "launch" / "forward.cu").touch()
        text = compile.ninja_file(csrc, found, Architecture("80").flags(), "/pybind11", {})
        folder = str(csrc).replace(" ", "$ ")
        assert f"build launch/forward.cu.o: nvcc {folder}/launch/forward.cu" in text
        assert f"build bindings.cpp.o: cxx {folder}/bindings.cpp" in text
        flags = dict(line.split(" = ", 1) for line in text.splitlines() if "flags = " in line)
        assert "-I/pybind11" in flags["cxxflags"]
        assert "-I/pybind11" not in flags["nvccflags"]
        assert "fast_math" not in text

    @pytest.mark.parametrize(
        "options, flag", [("--compress-mode [size]", "--compress-mode=size"), ("", "-Xfatbin=-compress-all")]
    )
    def test_machine_code_is_compressed_and_without_line_numbers(self, tmp_path, options: str, flag: str) -> None:
        found = toolkit.Toolkit.at(make_toolkit(tmp_path, options=options))
        text = compile.ninja_file(tmp_path, found, Architecture("80").flags(), "/pybind11", {})
        assert flag in text and "lineinfo" not in text


def test_the_resource_report_reads_what_ptxas_prints_and_merges_sources() -> None:
    name = "_Z4axpyIfEvPT_"
    none = {"name": name, "spill_stores": 0, "spill_loads": 0, "stack": 0}
    spilling = {"name": name, "registers": 255, "static_shared": 0, "stack": 16, "spill_stores": 8, "spill_loads": 4}
    assert resources.parse_ptxas(PTXAS_OUTPUT) == {
        "sm_80": {name: {"registers": 12, "static_shared": 512, "constant": 600, **none}},
        "sm_90a": {name: spilling},
    }
    merged = resources.merge([{"sm_80": {"a": {"registers": 1}}}, {"sm_80": {"b": {"registers": 2}}}])
    assert merged == {"sm_80": {"a": {"registers": 1}, "b": {"registers": 2}}}


class TestDamagedFiles:
    """Each in a fresh process, as a process looks for the native module once."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        """The package without its other modules (and so without torch), and a damaged native module."""
        package = tmp_path / "fused_sepconv"
        native = package / "native"
        (native / "lib").mkdir(parents=True)
        (package / "__init__.py").touch()
        for name in ("__init__.py", "loader.py", "sources.py"):
            shutil.copyfile(ROOT / "fused_sepconv" / "native" / name, native / name)
        (native / "lib" / "_native.so").write_text("no shared object")
        return package

    def run(self, package: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ |= {key: value for key, value in os.environ.items() if key != "FUSED_SEPCONV_NATIVE"}
        command = [sys.executable, "-c", f"from fused_sepconv.native import loader as native; {code}"]
        return subprocess.run(command, cwd=package.parent, env=environ, capture_output=True, text=True)

    def test_the_one_that_the_environment_names_is_an_error(self, package: Path) -> None:
        file = package / "native" / "lib" / "_native.so"
        run = self.run(package, "native.load()", FUSED_SEPCONV_NATIVE=str(file))
        assert run.returncode != 0
        assert f"ImportError: FUSED_SEPCONV_NATIVE names {file}, which can't be loaded: " in run.stderr

    def test_the_one_beside_the_package_or_another_pythons_is_a_reason(self, package: Path) -> None:
        code = "assert native.load() is native.path() is native.build_info() is None; assert native.resources() == {}"
        run = self.run(package, f"{code}; print(native.why_missing())")
        assert run.returncode == 0, run.stderr
        assert "_native.so can't be loaded: " in run.stdout
        (package / "native" / "lib" / "_native.so").rename(package / "native" / "lib" / "_native.cpython-27-none.so")
        run = self.run(package, "assert native.load() is None; print(native.why_missing())")
        assert "built for another Python: _native.cpython-27-none.so" in run.stdout


class TestProbe:
    """What a device is asked, and what is remembered; the module is a stand-in that answers what it is told."""

    class Module:
        def __init__(self, built: str, *answers: tuple[str, str, bool], capability: tuple[int, int] = (9, 0)) -> None:
            self.answers, self.asked, self.current = list(answers), 0, None
            self.build_info = lambda: {"architectures": built}
            self.device_attributes = lambda index: dict(zip(("major", "minor"), capability, strict=True))

        def set_device(self, index: int) -> None:
            self.current = index

        def probe(self) -> tuple[str, str, bool]:
            self.asked += 1
            return self.answers.pop(0)

    def install(self, monkeypatch: pytest.MonkeyPatch, module: Module) -> None:
        monkeypatch.setattr(loader, "load", lambda: module)
        monkeypatch.setattr(loader, "_answers", {})

    def test_a_device_that_runs_the_build_is_asked_once(self, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
        module = self.Module("80;90;100+PTX", ("", "", False))
        self.install(monkeypatch, module)
        assert [loader.why_not_on(1) for _ in range(3)] == [""] * 3
        assert (module.asked, module.current) == (1, 1)
        assert not recwarn

    def test_what_can_not_change_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self.Module("90", ("cudaErrorNoKernelImageForDevice", "no kernel image", True))
        self.install(monkeypatch, module)
        for _ in range(3):
            assert loader.why_not_on(0).endswith("on GPU 0: cudaErrorNoKernelImageForDevice: no kernel image")
        assert module.asked == 1

    def test_what_may_pass_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self.Module("90", ("cudaErrorMemoryAllocation", "out of memory", False), ("", "", False))
        self.install(monkeypatch, module)
        assert "out of memory" in loader.why_not_on(0)
        assert loader.why_not_on(0) == loader.why_not_on(0) == ""
        assert module.asked == 2

    def test_another_device_and_another_module_are_asked_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self.Module("90", ("", "", False), ("", "", False))
        self.install(monkeypatch, module)
        assert loader.why_not_on(0) == loader.why_not_on(1) == ""
        assert module.asked == 2
        other = self.Module("90", ("cudaErrorInsufficientDriver", "too old", True))
        monkeypatch.setattr(loader, "load", lambda: other)
        assert "too old" in loader.why_not_on(0)

    def test_compiling_from_ptx_is_said_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, self.Module("80;90;100+PTX;120", ("", "", False), capability=(11, 0)))
        with pytest.warns(
            UserWarning, match=r"no machine code for GPU 0 of compute capability 11\.0.*ARCHS=110"
        ) as said:
            assert loader.why_not_on(0) == loader.why_not_on(0) == ""
        assert len(said) == 1

    @pytest.mark.parametrize(
        "built, capability, runs",
        [
            *[("80;90;100+PTX;120", capability, True) for capability in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 1))],
            *[("80;90;100+PTX;120", capability, False) for capability in ((7, 5), (11, 0), (13, 0))],
            *[("90a", (9, 0), True), ("100a+PTX", (10, 3), False), ("86", (8, 0), False), ("100f", (10, 3), True)],
        ],
    )
    def test_machine_code_runs_within_its_major_version(self, built, capability, runs) -> None:
        assert loader.has_code_for(built, capability) is runs


class TestSearch:
    """Which module a checkout takes; the modules are stand-ins that know what they were built from."""

    @pytest.fixture
    def checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "params.h").touch()
        monkeypatch.delenv("FUSED_SEPCONV_NATIVE", raising=False)
        monkeypatch.setattr(loader, "_PACKAGE", tmp_path / "fused_sepconv")
        monkeypatch.setattr(loader, "_installed_folders", lambda: [tmp_path / "installed" / "lib"])
        monkeypatch.setattr(sources, "checkout_csrc", lambda: tmp_path / "csrc")
        monkeypatch.setattr(
            loader,
            "_import",
            lambda file: SimpleNamespace(file=file, build_info=lambda: {"sources": file.read_text()}),
        )
        return tmp_path

    def module(self, folder: Path, sources: str) -> Path:
        file = folder / "lib" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        file.parent.mkdir(parents=True)
        file.write_text(sources)
        return file

    def search(self) -> tuple[SimpleNamespace | None, str]:
        return loader._search.__wrapped__()

    def test_the_installed_module_serves_the_checkout_that_it_was_built_from(self, checkout: Path) -> None:
        file = self.module(checkout / "installed", sources.digest(checkout / "csrc"))
        module, reason = self.search()
        assert (module.file, reason) == (file, "")

    def test_a_stale_module_is_not_used_and_said_to_be_stale(self, checkout: Path) -> None:
        file = self.module(checkout / "installed", sources.digest(checkout / "csrc"))
        (checkout / "csrc" / "params.h").write_text("edited")
        with pytest.warns(UserWarning, match=r"other sources than .*`pip install \.` in the checkout rebuilds"):
            module, reason = self.search()
        assert module is None
        assert str(file) in reason

    def test_a_stale_module_beside_the_package_gives_way_to_an_installed_one(self, checkout: Path) -> None:
        self.module(checkout / "fused_sepconv", "older")
        file = self.module(checkout / "installed", sources.digest(checkout / "csrc"))
        assert self.search()[0].file == file

    def test_a_checkout_that_was_never_built_says_so(self, checkout: Path) -> None:
        module, reason = self.search()
        assert module is None
        assert reason.startswith(f"the kernels of the checkout {checkout} are not built; `pip install .` builds them")

    def test_an_installed_package_has_no_sources_to_compare(
        self, checkout: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "checkout_csrc", lambda: None)
        assert "installed without kernels" in self.search()[1]
        file = self.module(checkout / "fused_sepconv", "whatever")
        assert self.search()[0].file == file


def test_what_is_loaded_here_is_consistent() -> None:
    if loader.load() is None:
        assert loader.path() is loader.build_info() is None
        assert loader.resources() == {}
        assert loader.why_missing()
    else:
        assert Path(loader.path()).is_file()
        assert loader.why_missing() == ""
        assert set(loader.build_info()) >= {"version", "architectures", "nvcc", "sources", "emulated"}
