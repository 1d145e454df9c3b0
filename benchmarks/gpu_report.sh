#!/usr/bin/env bash
# The one command for a machine with a GPU: builds, proves, measures and packs all of it, in 480 seconds.
#
#   bash benchmarks/gpu_report.sh              everything goes to gpu_report/, packed into gpu_report.tar.gz
#   OUT=/some/folder bash benchmarks/gpu_report.sh
#   bash benchmarks/gpu_report.sh --rehearse   every stage at its smallest, on the emulator: for a machine without a GPU
#
# The most decisive stages come first. Each stage has a budget; what a stage leaves of its own goes to those after it. A stage
# that runs out of time gets SIGINT, as Ctrl-C sends it, so that it still says what it found; the next runs whatever
# became of it. Only the architecture at hand is built, into an environment of its own. The last lines are a summary;
# the exit status is the number of stages that failed.
set -u
cd "$(dirname "$0")/.."
rehearse=
[ "${1:-}" = --rehearse ] && rehearse=1
out=${OUT:-gpu_report}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python}
command -v "$python" >/dev/null || python=python3
scale=${SCALE:-100} # percent of every budget
summary=$out/summary.txt
: >"$summary"
failed=0
end=0 # of the time that all stages so far may take, in seconds from the start

# stage NAME BUDGET COMMAND...: runs it with its output in NAME.log, and notes how it ended.
stage() {
  local name=$1 budget=$(($2 * scale / 100)) start=$SECONDS status=0 left outcome=ok
  shift 2
  end=$((end + budget))
  left=$((end - SECONDS))
  echo "== $name: budget $budget s, until second $end of the run"
  if [ "$left" -le 0 ]; then
    echo "no time was left" >"$out/$name.log"
    status=124
  else
    # A process that a background job starts ignores SIGINT, unless it is told otherwise.
    env --default-signal=INT timeout --signal=INT --kill-after=5 "$left" "$@" >"$out/$name.log" 2>&1 || status=$?
  fi
  tail -n 3 "$out/$name.log"
  if [ "$status" -ne 0 ]; then
    failed=$((failed + 1))
    outcome="exit $status"
    case $status in 124 | 137) outcome="time out" ;; esac
  fi
  printf '%-20s %-9s %4d s of %3d   %s\n' "$name" "$outcome" $((SECONDS - start)) "$budget" \
    "$(tail -n 1 "$out/$name.log" | cut -c1-100)" >>"$summary"
}

# An environment of its own, which sees the packages of the Python at hand: that one may refuse `pip install` (PEP 668),
# and a report changes nothing on a machine. A virtual environment is used as it is.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -z "$rehearse" ] && [ "$($python -c 'import sys; print(sys.prefix == sys.base_prefix)' 2>/dev/null)" = True ]; then
  $python -m venv --system-site-packages --without-pip "$scratch/venv" && python=$scratch/venv/bin/python
fi

environment() {
  if [ -z "$rehearse" ]; then
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  fi
  git rev-parse HEAD
  git status --short
  $python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'
  needs
}

# Names what is missing on this machine and what that costs; said first, as there is nothing to install from.
needs() {
  $python - <<'PYTHON'
import importlib.metadata, importlib.util, os, sys

sys.path.insert(0, ".")
from build_native.toolkit import find_toolkit

needed = {"pybind11": "build", "ninja": "build", "pytest": "tests", "hypothesis": "tests", "numpy": "all"}
if not os.environ.get("rehearse"):
    needed |= {"pip": "build", "setuptools": "build", "xdist": "tests"}
missing = [f"{name} (for {what})" for name, what in needed.items() if importlib.util.find_spec(name) is None]
if "setuptools" in needed and importlib.util.find_spec("setuptools"):
    version = importlib.metadata.version("setuptools")
    if tuple(map(int, version.split(".")[:2])) < (70, 1) and importlib.util.find_spec("wheel") is None:
        missing.append(f"wheel (for build, as setuptools {version} can't do without)")
try:
    print("nvcc:", find_toolkit(os.environ).nvcc)
except LookupError as error:
    print(error)
    if not os.environ.get("rehearse"):
        missing.append("nvcc (for build)")
print("missing: " + ", ".join(missing) if missing else "all that is needed is there")
sys.exit(bool(missing))
PYTHON
}

# "9.0" -> "90a": the architecture at hand, with the features that only it has.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
[ "$capability" = 90 ] && capability=90a

build() {
  if [ -n "$rehearse" ]; then
    $python -m tests.cuda_on_cpu
    return
  fi
  FUSED_SEPCONV_CUDA=1 FUSED_SEPCONV_ARCHS=$capability MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    $python -m pip install --no-build-isolation --no-deps . && $python -m fused_sepconv
}

sanitize() { # TOOL, ARGUMENTS of run_cases...
  local tool=$1 sanitizer
  shift
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$rehearse" ]; then
    sanitizer=stand_in
  elif [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not on this machine"
    return 1
  fi
  # Of our kernels alone: their mangled names hold the namespace's. Each tensor has memory of its own, or a kernel could
  # leave one and be in the next.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --kernel-regex kns=fused_sepconv --error-exitcode 9 $python -m tests.run_cases "$@"
}

stand_in() { # what compute-sanitizer is given, without it
  while [ "$1" != "$python" ]; do shift; done
  "$@"
}

export -f environment needs build sanitize stand_in
export python capability rehearse

files=(tests/api/test_forward.py tests/api/test_gradients.py tests/api/test_layout.py)
if [ -n "$rehearse" ]; then
  stage environment 60 bash -c environment
  stage build 400 bash -c build
  FUSED_SEPCONV_NATIVE=$(tail -n 1 "$out/build.log")
  export FUSED_SEPCONV_NATIVE
  stage cases 90 $python -m tests.run_cases --smallest
  stage first-minutes 60 $python benchmarks/first_minutes.py --rehearse --json "$out/first_minutes.json"
  stage sanitizer-memcheck 60 bash -c 'sanitize memcheck --smallest --only reduce'
  stage accuracy 60 $python -m tests.accuracy --family mma --reduced --layers 728@19 --dtype bfloat16
  unset FUSED_SEPCONV_NATIVE # the tests choose their own
  export PYTHONPATH=$PWD # a rehearsal installs nothing
  stage tests 60 $python -m pytest -v -rf --tb=short -p no:cacheprovider -k "cpu-fused and float32-plain" "${files[0]}"
  stage conformance 20 $python -m tests.cuda_on_cpu.conformance --rehearse
  stage bench 120 $python benchmarks/bench.py --quick --suite layers --networks xception --passes fwd --layout nhwc \
    --peers eager --json "$out/bench.json"
else
  stage environment 10 bash -c environment
  stage build 140 bash -c build
  stage cases 60 $python -m tests.run_cases
  stage first-minutes 75 $python benchmarks/first_minutes.py --json "$out/first_minutes.json"
  stage sanitizer-memcheck 40 bash -c 'sanitize memcheck --smallest'
  stage sanitizer-racecheck 40 bash -c 'sanitize racecheck --smallest'
  stage accuracy 25 $python -m tests.accuracy --family mma
  stage tests 45 $python -m pytest -v -rf --tb=short -p no:cacheprovider -n "$(($(nproc) / 2))" --dist worksteal \
    -k cuda "${files[@]}"
  stage conformance 15 $python -m tests.cuda_on_cpu.conformance
  ceilings=()
  grep -q '"ceilings": {' "$out/first_minutes.json" 2>/dev/null && ceilings=(--ceilings "$out/first_minutes.json")
  stage bench 30 $python benchmarks/bench.py --peers eager "${ceilings[@]}" --json "$out/bench.json"
fi

[ -f tests/cuda_on_cpu/conformance/vectors.npz ] && cp tests/cuda_on_cpu/conformance/vectors.npz "$out/"
archive=$out.tar.gz
tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"
[ "$(stat -c %s "$archive")" -lt $((16 * 1024 * 1024)) ] || echo "the archive is larger than 16 MiB" >>"$summary"
echo
cat "$summary"
echo "$failed stages failed; $SECONDS s; $archive"
exit "$failed"
