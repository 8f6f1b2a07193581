#!/bin/bash
# Runs the official TUF conformance suite, as it is and all of it, against the device's client:
#
#     agent/tests/tuf/conformance.sh DIRECTORY [pytest's arguments]
#
# DIRECTORY is a checkout of theupdateframework/tuf-conformance, which is not in any package archive. Needs `make setup`, and the
# Debian package faketime. docs/tuf.md says which revision passed.
set -euo pipefail

suite=$(realpath "${1:?usage: $0 DIRECTORY [pytest arguments]}")
shift
cd "$(dirname "$0")/../../.."
environment=${OFFSHOOT_CACHE:-$HOME/.cache/offshoot}/python-tuf
[[ -x $environment/bin/pytest ]] || { echo "no $environment/bin/pytest: run \`make setup\`" >&2; exit 2; }
command -v faketime > /dev/null || { echo "no faketime: run \`apt-get install faketime\`" >&2; exit 2; }

# Dynamically linked: faketime goes between a program and its C library.
cargo build --locked --package offshoot --example tuf-conformance
client=$(cargo metadata --format-version 1 --no-deps | "$environment/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
client=$client/debug/examples/tuf-conformance
[[ ! -e $client.xfails ]] || { echo "$client.xfails excludes tests: remove it" >&2; exit 2; }
cd "$suite"
exec "$environment/bin/pytest" --override-ini=cache_dir="$environment/pytest" tuf_conformance --entrypoint "$client" "$@"
