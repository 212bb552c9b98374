#!/usr/bin/env bash
# On a machine with a GPU, nvcc and torch with CUDA: builds for that GPU, runs the whole test suite and
# compute-sanitizer over the kernel tests, then the benchmarks; raw results go to bench/results/<gpu>/ (or to
# $OUT where that is set). Needs no network: it uses the Python that is there.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))') || exit 1
capability=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a == 9 else ""))')
results=${OUT:-bench/results/$gpu}
mkdir -p "$results"
export PYTHONPATH=$PWD/python ARIMG_LIBRARY_DIR=$PWD/build/gpu
failed=0

echo "== build for $gpu (sm_$capability)"
"$python" -m cmake --version > /dev/null 2>&1 && cmake=("$python" -m cmake) || cmake=(cmake)
"${cmake[@]}" -S . -B build/gpu -G Ninja -DARIMG_CUDA=ON -DARIMG_CUDA_ARCHITECTURES="$capability" \
  -DPython_EXECUTABLE="$(command -v "$python")" > "$results/build.log" &&
  "${cmake[@]}" --build build/gpu -j "$(nproc)" >> "$results/build.log" 2>&1 || { tail -30 "$results/build.log"; exit 1; }

echo "== tests"
"$python" -m pytest tests -q -x 2>&1 | tee "$results/tests.log" | tail -15
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1

echo "== compute-sanitizer"
for tool in memcheck racecheck synccheck; do
  timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest tests -q -k "cuda and not emulated" -m "not slow" -x > "$results/sanitizer-$tool.log" 2>&1 ||
    { echo "$tool: failed or ran out of time"; tail -5 "$results/sanitizer-$tool.log"; failed=1; }
done

echo "== benchmarks"
"$python" -m pytest bench -q --benchmark-quiet --benchmark-json "$results/bench.json" 2>&1 | tee "$results/bench.txt" | tail -60
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
exit $failed
