#!/usr/bin/env bash
# Build the CPU image from its own Dockerfile and run the smoke test in it, on a machine without
# Docker and without access to an image registry: Debian or Ubuntu, as root, with buildah and
# debootstrap (apt-get install buildah debootstrap).
#
#   deploy/build_image.sh DIRECTORY [flags for vllm serve]
#
# vLLM's image cannot be fetched then. A stand-in takes its place: Debian with what the Dockerfile
# and the server expect of vLLM's image, namely /opt/venv with vLLM 0.32, curl and a compiler. All
# else is what `docker build` would do: buildah executes Dockerfile.cpu as it is.
#
# STORE=build/image    where images are kept, 8 GB; a stand-in that is there is used again
# PIP_FOLDERS=""       folders of this machine that pip's configuration names, separated by spaces
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
store=${STORE:-$root/build/image}
standin=localhost/vllm-openai-cpu-stand-in
image=localhost/vllm-precalib-cpu
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}

say() { echo "image: $*"; }
fail() {
  echo "image: $*" >&2
  exit 1
}
buildah() { command buildah --root "$store/storage" --runroot "$store/run" "$@"; }

[[ $# -ge 1 ]] || fail "usage: deploy/build_image.sh DIRECTORY [flags for vllm serve]"
[[ -f $1/config.json ]] || fail "$1 is no model directory: it has no config.json"
[[ $(id -u) = 0 ]] || fail "debootstrap and chroot need root"
for tool in buildah debootstrap; do
  [[ -n $(type -P $tool) ]] || fail "$tool is missing: apt-get install $tool"
done
model=$(readlink -f "$1")
shift
mkdir -p "$store"

# What pip is told here holds inside as well.
pip_options=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)
for folder in ${PIP_FOLDERS:-}; do pip_options+=(--volume "$folder:$folder:ro"); done
while IFS= read -r variable; do pip_options+=(--env "$variable"); done < <(env | grep '^PIP_' || true)

make_standin() {
  local container mount
  container=$(buildah from scratch)
  mount=$(buildah mount "$container")
  debootstrap --variant=minbase \
    --include=python3-venv,python3-dev,g++,curl,ca-certificates,libnuma1,libgomp1 bookworm "$mount"
  rm -rf "$mount"/var/cache/apt/archives/*.deb
  buildah config --env PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    --env VIRTUAL_ENV=/opt/venv --workingdir / "$container"
  buildah run "$container" -- python3 -m venv /opt/venv
  buildah run "${pip_options[@]}" --volume "$here:/tmp/deploy:ro" "$container" -- \
    /opt/venv/bin/python -m pip install --quiet --no-cache-dir --no-deps -r /tmp/deploy/constraints.txt
  cp -r "$here/vllm-metapackage" "$mount/tmp/metapackage"
  buildah run "$container" -- \
    /opt/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation /tmp/metapackage
  rm -r "$mount/tmp/metapackage"
  buildah commit --quiet --rm "$container" "$standin" >/dev/null
}

if ! buildah inspect --type image "$standin" >/dev/null 2>&1; then
  say "making the stand-in of vLLM's image, some minutes"
  make_standin
fi

say "executing deploy/Dockerfile.cpu"
buildah build --pull-never --ignorefile "$here/Dockerfile.cpu.dockerignore" --build-arg "BASE=$standin" \
  --tag "$image" -f "$here/Dockerfile.cpu" "$root"

container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
say "as $(buildah inspect --format '{{.OCIv1.Config.User}}' "$image"): $(buildah run "$container" -- id)"
found=$(buildah run "$container" -- precalib doctor || true)
say "$(grep ' CPU kernels ' <<<"$found" || echo 'precalib doctor says nothing of CPU kernels')"
say "smoke test in the image, with the model mounted read-only"
buildah run --volume "$here:/deploy:ro" --volume "$model:/model:ro" \
  --env VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" \
  --env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" --env SMOKE_SECONDS="${SMOKE_SECONDS:-300}" \
  "$container" -- /deploy/smoke.sh /model "$@"
say "ok"
