#!/usr/bin/env bash
# The studio's pages in a real Chromium, which is installed where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
make browser CHROMIUM="$(command -v chromium)"
