#!/bin/sh
# Renews the lock files from pyproject.toml: every version and the digest of every file, so that a later
# build of the image installs the tested files. Needs uv, which pip installs.
set -eu
cd "$(dirname "$0")/../.."
command -v uv >/dev/null || { echo "lock.sh: expected uv on the path, but it is missing. Run: pip install uv"; exit 2; }
build=$(mktemp) cuda=$(mktemp)
trap 'rm -f "$build" "$cuda"' EXIT
printf 'setuptools>=77\nwheel\n' >"$build"
printf 'jax[cuda12]\n' >"$cuda"
lock() {
  uv pip compile pyproject.toml "$build" "$@" --extra serve --extra grpc \
    --python-version 3.11 --python-platform linux \
    --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet
}
lock -o deploy/docker/requirements.lock
# The same versions as on CPU, plus CUDA.
lock "$cuda" -c deploy/docker/requirements.lock -o deploy/docker/requirements-gpu.lock
