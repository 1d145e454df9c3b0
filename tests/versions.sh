#!/usr/bin/env bash
# The tests that need no emulated kernel, on several releases of PyTorch, each in a virtual environment of its own.
#
#   bash tests/versions.sh                          # the oldest, the one of GPU machines, the newest
#   bash tests/versions.sh 2.7.0 -- tests/api       # one release; what follows -- is pytest's
#   PYTHON=python3.13 bash tests/versions.sh 2.14.1
#
# Environments are kept in build/versions/ (several GB each, as PyPI's PyTorch brings CUDA) and used again. The last
# lines are a table. Exits with 1 where a test failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# torchvision's release goes with PyTorch's: what is not in this list is left to pip.
declare -A torchvision=([2.7.0]=0.22.0 [2.11.0]=0.26.0 [2.13.0]=0.28.0 [2.14.1]=0.29.1)
versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#versions[@]} -gt 0 ] || versions=(2.7.0 2.11.0 2.14.1)
arguments=("$@")
[ ${#arguments[@]} -gt 0 ] || arguments=(tests --ignore=tests/kernels --ignore=tests/examples --ignore=tests/benchmarks)

python=${PYTHON:-python3}
name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])') || exit 1
status=0 table=()
for version in "${versions[@]}"; do
  environment=build/versions/$name-torch-$version
  if [ ! -e "$environment/ready" ]; then
    "$python" -m venv "$environment" &&
      "$environment/bin/pip" install --quiet "torch==$version" "torchvision${torchvision[$version]:+==${torchvision[$version]}}" &&
      FUSED_SEPCONV_CUDA=0 "$environment/bin/pip" install --quiet ".[test]" "torch==$version" &&
      "$environment/bin/pip" uninstall --quiet --yes fused_sepconv &&
      touch "$environment/ready" || { table+=("$name torch $version: could not be installed"); status=1; continue; }
  fi
  log=$environment/tests.log
  # The emulated kernels do not depend on PyTorch: one release's run of them is enough.
  "$environment/bin/python" -m pytest -q --tb=short -k "not cpu-fused" "${arguments[@]}" 2>&1 | tee "$log" || status=1
  table+=("$name torch $version: $(tail -n 1 "$log")")
done
printf '%s\n' "${table[@]}"
exit $status
