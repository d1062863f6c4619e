#!/bin/sh
# Run the tests on the oldest libraries that install_requires in setup.cfg allows.
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv-oldest}
mkdir -p "$VENV"
sed -n '/^install_requires/,/^$/s/^ *\([a-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg >"$VENV/constraints.txt"
PIP_CONSTRAINT="$VENV/constraints.txt" make "$VENV/.dev" PYTHON="$PYTHON" VENV="$VENV"
"$VENV/bin/python" -c 'from importlib.metadata import version as v; print("torch", v("torch"), "megatron-core", v("megatron-core"))'
exec "$VENV/bin/python" -m pytest "$@"
