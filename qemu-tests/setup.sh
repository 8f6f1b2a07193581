#!/bin/bash
# Installs what building and testing Offshoot needs, on a fresh Debian 12 (bookworm) or 13 (trixie), as root.
# Run it as often as you like: when everything is there it asks the package database and does nothing.
set -euo pipefail

cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
case $suite in
    bookworm | trixie) ;;
    *) echo "setup.sh knows Debian bookworm and trixie, not '${suite:-this system}'" >&2; exit 1 ;;
esac

packages=(
    # Rust and the C library that offshoot-deployer and offshoot-fleet link.
    gcc libc6-dev pkg-config libostree-dev git make curl ca-certificates
    # The OS image.
    mmdebstrap debian-archive-keyring ostree
    grub-common grub-efi-amd64-bin dosfstools mtools e2fsprogs fdisk attr libcap2-bin bmap-tools
    # The machine: its firmware, its disk overlays.
    ovmf qemu-utils util-linux
    # U-Boot, built from source, and the tools that share its environment.
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross bison flex bc bzip2 libssl-dev u-boot-tools libubootenv-tool
    # The device's programs for arm64 (agent/cross-arm64), an OS for it, and starting what is in it.
    qemu-user-static arch-test
    # A web server that is not ours.
    nginx-light openssl
    # A TUF implementation and a store that are not ours.
    python3 python3-venv
    # Keys in tokens behind PKCS#11, and in a TPM.
    softhsm2 opensc swtpm tpm2-tools
    # What a program took.
    time
    # What offshoot-fleet push runs.
    rsync
)
# Version 7.2, bookworm's own, miscompiles cmpxchg16b under emulation, and the guest's kernel dies of it.
qemu_at_least=10

is_installed() {
    dpkg-query --show --showformat='${db:Status-Status}\n' "$1" 2>/dev/null | grep --quiet --line-regexp installed
}

qemu_is_new_enough() {
    local package version
    for package in qemu-system-x86 qemu-system-arm; do
        version=$(dpkg-query --show --showformat='${Version}' "$package" 2>/dev/null) || return 1
        dpkg --compare-versions "$version" ge "1:$qemu_at_least" || return 1
    done
}

# qemu-tests/uboot/fetch takes it from there.
apt_knows_uboot() {
    apt-cache showsrc u-boot 2>/dev/null | grep '^Version: 2025\.01-' >/dev/null
}

# The compiler that the workspace asks for (`rust-version` in Cargo.toml), or a newer one.
rust_is_new_enough() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    found=$(rustc --version 2>/dev/null | cut --delimiter=' ' --fields=2) || return 1
    command -v cargo >/dev/null && dpkg --compare-versions "${found:-0}" ge "$wanted"
}

# What is in Python, from PyPI, beside the images: the reference implementation of TUF, and a store that speaks S3. The list of what is in
# each is its last file.
install_python() {
    install_environment python-tuf agent/tests/tuf/requirements.txt
    install_environment python-s3 fleet/tests/s3/requirements.txt
}

install_environment() {
    local environment=${OFFSHOOT_CACHE:-$HOME/.cache/offshoot}/$1 wanted=$2
    cmp --silent "$wanted" "$environment/requirements.txt" && return
    rm --recursive --force "$environment"
    mkdir --parents "${environment%/*}"
    /usr/bin/python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check --requirement "$wanted"
    cp "$wanted" "$environment/requirements.txt"
}

missing=()
for package in "${packages[@]}"; do
    # openresty's, nginx.org's and Debian's fuller packages are nginx, too.
    [[ $package == nginx-light ]] && command -v nginx >/dev/null && continue
    is_installed "$package" || missing+=("$package")
done
rust=()
rust_is_new_enough || rust=(cargo-web rustc-web)
if [[ ${#missing[@]} == 0 && ${#rust[@]} == 0 ]] && qemu_is_new_enough && apt_knows_uboot; then
    install_python
    exit 0
fi
if [[ $(id --user) != 0 ]]; then
    echo "setup.sh must be root to install: ${missing[*]} ${rust[*]} qemu-system-x86 qemu-system-arm (>= $qemu_at_least)" >&2
    exit 1
fi

if [[ $suite == bookworm ]] && ! qemu_is_new_enough &&
    ! grep --recursive --quiet bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null; then
    cat > /etc/apt/sources.list.d/offshoot-backports.sources <<'EOF'
Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
fi

# Only its sources: no package of trixie's gets onto bookworm.
if ! apt_knows_uboot && [[ ! -e /etc/apt/sources.list.d/offshoot-uboot.sources ]]; then
    cat > /etc/apt/sources.list.d/offshoot-uboot.sources <<'EOF'
Types: deb-src
URIs: http://deb.debian.org/debian
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
fi

export DEBIAN_FRONTEND=noninteractive
# No installed service starts: not nginx, not anything. Our refusal goes with us, somebody else's stays.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    trap 'rm --force /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
fi
install() {
    apt-get install --yes --quiet --quiet --no-install-recommends "$@"
}

apt-get update --quiet --quiet
if [[ ${#missing[@]} != 0 ]]; then
    install "${missing[@]}"
fi
if ! qemu_is_new_enough; then
    if [[ $suite == bookworm ]]; then
        install --target-release bookworm-backports qemu-system-x86 qemu-system-arm
    else
        install qemu-system-x86 qemu-system-arm
    fi
fi
if [[ ${#rust[@]} != 0 ]]; then
    # Debian's own compiler for its browsers: newer than the suite's, kept up by its security team.
    install "${rust[@]}"
fi
apt_knows_uboot || { echo "apt has no source of U-Boot 2025.01" >&2; exit 1; }
qemu_is_new_enough || { echo "QEMU $qemu_at_least or newer is not to be had from apt" >&2; exit 1; }
rust_is_new_enough || { echo "a Rust as new as Cargo.toml asks for is not to be had from apt" >&2; exit 1; }
install_python
