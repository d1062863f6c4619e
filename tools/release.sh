#!/bin/sh
# Prepare a release: build the sdist and, from it, the wheel, in dist/; tag what they were built of with the version's part of
# CHANGELOG.md. Nothing is pushed or uploaded. --no-tag builds alone. PYTHON=python3.12 chooses the interpreter (with `build`).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' w2s/__init__.py)
text=$(awk -v version="$version" '/^## /{shown = $2 == version} shown' CHANGELOG.md | sed 's/^##* //')
[ -n "$text" ] || { echo "error: CHANGELOG.md has no part for $version" >&2; exit 2; }
rm -rf dist
"$PYTHON" -m build --no-isolation --outdir dist .
[ "${1:-}" = --no-tag ] || printf 'w2s %s\n' "$text" | git tag --annotate "v$version" --cleanup=verbatim --file=-
