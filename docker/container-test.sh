#!/usr/bin/env bash
# Builds the image, runs it with compose on the CPU, embeds two texts and stops it. `make container-test`
#
# Uses Docker, or podman where no Docker engine answers. BASE_IMAGE is the image's base, python:3.12-slim by default.
set -euo pipefail
cd "$(dirname "$0")/.."

project=llm2vec-container-test
image=llm2vec-service:container-test
start_seconds=600
python=.venv/bin/python
scratch=$(mktemp -d)
compose=()

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'container-test: %s\n' "$*" >&2; exit 1; }

clean_up() {
  local status=$?
  trap - EXIT
  set +e
  if [ "${#compose[@]}" -gt 0 ]; then
    if [ "$status" -ne 0 ]; then
      say "the server's last lines"
      "$engine" logs --tail 100 "$project" 2>&1
    fi
    "${compose[@]}" down --volumes >"$scratch/down.log" 2>&1 || cat "$scratch/down.log"
  fi
  rm -rf "$scratch"
  if [ "$status" -ne 0 ]; then
    echo "0 passed, 1 failed"
  fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

[ -x "$python" ] || fail "there is no $python: run make install first"

if docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
  engine=docker
  build=(docker build)
  up=("docker" "compose")
elif command -v podman >/dev/null && command -v buildah >/dev/null; then
  engine=podman
  # chroot and the host's network ask for less than a container does; the docker format keeps the HEALTHCHECK.
  build=(buildah bud --isolation chroot --network host --format docker)
  up=(.venv/bin/podman-compose)
  if [ -z "${BASE_IMAGE:-}" ] && podman image exists localhost/python-slim; then
    BASE_IMAGE=localhost/python-slim
  fi
  # Health checks are run by systemd's timers; where there are none, podman would complain at every start and stop.
  [ -d /run/systemd/system ] || export DISABLE_HC_SYSTEMD=true
else
  fail "this needs a Docker engine with compose, or podman and buildah"
fi
base=${BASE_IMAGE:-python:3.12-slim}

say "torch's wheel, for the Python of $base"
torch=$(sed -n 's/^torch==//p' constraints.txt)
python_version=$("$engine" run --rm --entrypoint python3 "$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wheels="docker/wheels/torch-$torch*-cp${python_version/./}-*.whl"
if ! compgen -G "$wheels" >/dev/null; then
  .venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
    --dest docker/wheels --constraint constraints.txt "torch==$torch"
fi
compgen -G "$wheels"
case $(compgen -G "$wheels") in
  *+cpu*) ;;
  *) echo "This torch may bring CUDA, several GB. Put a CPU build there, or let PIP_EXTRA_INDEX_URL lead to one." ;;
esac

say "build with $engine"
"$engine" image rm "$image" >/dev/null 2>&1 || true  # or each run would leave one more without a name
SECONDS=0
"${build[@]}" --build-arg "BASE_IMAGE=$base" --build-arg DEVICE=cpu --tag "$image" . >"$scratch/build.log" 2>&1 || {
  tail -n 50 "$scratch/build.log"
  fail "the image can't be built"
}
size=$("$engine" image inspect --format '{{.Size}}' "$image")
echo "built in $SECONDS s, $((size / 1000000)) MB"

say "start"
port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
# A user's .env stays out of it, and a server that ends stays down, so that its status can be read. With compile on, a
# server that can't compile the layers refuses to start.
cat >"$scratch/test.yml" <<YAML
services:
  llm2vec:
    image: $image
    container_name: $project
    env_file: !reset null
    environment:
      LLM2VEC_COMPILE: "on"
    restart: "no"
YAML
export MODEL=demo PORT=127.0.0.1:$port HF_TOKEN=
compose=("${up[@]}" --project-name "$project" -f docker-compose.yml -f docker/compose.cpu.yml -f "$scratch/test.yml")
"${compose[@]}" down --volumes >/dev/null 2>&1 || true  # what a run that was killed has left

start() {
  SECONDS=0
  "${compose[@]}" up --detach --no-build
  until "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=35)' \
    "http://127.0.0.1:$port/health" 2>/dev/null; do
    [ "$("$engine" inspect --format '{{.State.Running}}' "$project")" = true ] || fail "the server ended while starting"
    [ "$SECONDS" -lt "$start_seconds" ] || fail "the server is not ready after $SECONDS s"
    sleep 2
  done
  echo "ready in $SECONDS s"
}

# When each file of the encoder was written.
stored() { "$engine" exec "$project" sh -c 'cd /models/demo && stat --format "%n %Y" *'; }

start

say "check"
user=$("$engine" exec "$project" id -u)
[ "$user" -ne 0 ] || fail "the server runs as root"
echo "runs as user $user"

# The image's own check, by hand: the engine's may not have had its turn yet.
health=$("$engine" inspect --format '{{json .Config.Healthcheck.Test}}' "$project")
mapfile -t probe < <("$python" -c 'import json, sys; print(*json.loads(sys.argv[1])[1:], sep="\n")' "$health")
"$engine" exec "$project" "${probe[@]}" || fail "the health check fails on a server that is ready"
echo "the health check agrees"

"$python" - "http://127.0.0.1:$port/v1/embeddings" <<'PY'
import json
import math
import sys
import urllib.request

body = json.dumps({"model": "demo", "input": ["A cat sat on the mat.", "The weather is fine."]}).encode()
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=120) as response:
    vectors = [item["embedding"] for item in json.load(response)["data"]]
assert [len(vector) for vector in vectors] == [640, 640], [len(vector) for vector in vectors]
norms = [math.hypot(*vector) for vector in vectors]
assert all(abs(norm - 1) < 1e-3 for norm in norms), norms
assert vectors[0] != vectors[1]
print("2 vectors of 640 numbers, norms", *(f"{norm:.6f}" for norm in norms))
PY

before=$(stored)
say "stop"
SECONDS=0
"${compose[@]}" stop
status=$("$engine" inspect --format '{{.State.ExitCode}}' "$project")
[ "$status" -eq 0 ] || fail "the server ended with status $status"
echo "ended with status 0 in $SECONDS s"

say "start again, with the volume alone left"
"${compose[@]}" down
start
[ "$(stored)" = "$before" ] || fail "the encoder was built once more"
echo "the encoder of the first start was found"

echo
echo "1 passed, 0 failed"
