#!/usr/bin/env bash
# One wheel, several versions of torch. Builds a wheel with the development environment's torch, installs that
# same file beside each version given, and runs tests/compat/check.py there.
#
#   tests/compat/run.sh [VERSION ...]        default: 2.11.0, whose usual build has CUDA
#
# Each environment downloads torch with its CUDA libraries (several GB) and is kept in build/compat.
set -euo pipefail
cd "$(dirname "$0")/../.."
versions=("${@:-2.11.0}")
python=${PYTHON:-.venv/bin/python}
architectures=${CUDA_ARCHITECTURES:-80}
folder=$PWD/build/compat
mkdir -p "$folder/wheel"

rm -f "$folder"/wheel/*.whl
"$python" -m pip wheel . --no-build-isolation --no-deps -q -w "$folder/wheel" \
  -C cmake.define.ARIMG_CUDA_ARCHITECTURES="$architectures"
wheel=$(ls "$folder"/wheel/*.whl)
echo "built $(basename "$wheel") ($(du -h "$wheel" | cut -f1)) with torch $("$python" -c 'import torch; print(torch.__version__)')"

for version in "${versions[@]}"; do
  environment=$folder/torch-$version
  [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
  "$environment/bin/pip" install -q "torch==$version" numpy safetensors Pillow tqdm
  "$environment/bin/pip" install -q --no-deps --force-reinstall "$wheel"
  (cd "$folder" && env -u PYTHONPATH -u ARIMG_LIBRARY_DIR "$environment/bin/python" "$OLDPWD/tests/compat/check.py")
done
