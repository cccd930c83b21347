#!/usr/bin/env bash
# What others read of ours: exported models in onnxruntime, event files in TensorBoard's reader. Makes a Python environment under target/ where there
# is none, builds the program, writes the samples, compares.
# CARROUSEL_VECTORS may name a folder with more cases of PyTorch's than tests/vectors has. PyTorch itself takes part if that environment has it
# (target/interchange/venv/bin/pip install torch: several gigabytes).
set -euo pipefail
cd "$(dirname "$0")/../.."

# Those of a build that is there already, so that there need not be another.
features=${CARROUSEL_FEATURES:-}

place=$PWD/target/interchange
python=$place/venv/bin/python
if ! "$python" -c 'import onnxruntime, numpy, tensorboard' 2>/dev/null; then
    python3 -m venv "$place/venv"
    "$python" -m pip install --quiet --disable-pip-version-check onnxruntime numpy tensorboard
fi
rm -rf "$place/samples"
mkdir -p "$place/samples"
CARROUSEL_INTERCHANGE_SAMPLES=$place/samples cargo test --locked --features "$features" --test main -- interchange::samples interchange::a_bare_lstm_is_written
cargo build --locked --features "$features"
"$python" tests/interchange/check_onnx.py --carrousel target/debug/carrousel --work "$place/work" --samples "$place/samples"
"$python" tests/interchange/check_tensorboard.py --carrousel target/debug/carrousel --work "$place/tensorboard"
