#!/bin/sh
# Run the tests on the newest torch and Megatron-Core, which need a newer Python than 3.11.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.13}
VENV=${VENV:-.venv-newest}
make "$VENV/.dev" PYTHON="$PYTHON" VENV="$VENV"
"$VENV/bin/python" -c 'from importlib.metadata import version as v; print("torch", v("torch"), "megatron-core", v("megatron-core"))'
exec "$VENV/bin/python" -m pytest "$@"
