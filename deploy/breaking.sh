#!/bin/sh
# Refuse contract changes that break readers of what is on main. Usage: breaking.sh BIN
set -eu
bin=$1
base=origin/main
git rev-parse -q --verify "$base^{commit}" >/dev/null || base=main
git rev-parse -q --verify "$base^{commit}" >/dev/null || { echo "no main to compare the contracts with" >&2; exit 0; }
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" protos buf.yaml | tar -x -C "$old"
"$bin/python" "$old/protos/generate.py" "$old/pb" >/dev/null
"$bin/buf" breaking esper_core/pb/descriptors.binpb --against "$old/pb/descriptors.binpb" --config buf.yaml \
  --exclude-path google --exclude-path buf
