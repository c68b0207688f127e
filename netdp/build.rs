//! Builds the eBPF object that the agent carries.
//!
//! A stable compiler builds `core` for the BPF target when told to with `RUSTC_BOOTSTRAP`; the
//! setting reaches this one nested build and nothing else.

use std::{env, path::PathBuf, process::Command};

const TARGET: &str = "bpfel-unknown-none";

const RUSTFLAGS: [&str; 3] = [
    // Debug information becomes BTF, without which the kernel refuses some programs.
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    // Otherwise the linker makes loops over bytes of every copy, three zeroes of padding included:
    // they cost more than the lookup of a flow.
    "-Clink-arg=--disable-expand-memcpy-in-order",
];

fn main() {
    if let Err(error) = build() {
        // Cargo shows what follows `error=` as the build's own error.
        println!("cargo::error={error}");
    }
}

fn build() -> Result<(), String> {
    for input in ["netdp-ebpf/src", "netdp-ebpf/Cargo.toml", "netdp-common/src"] {
        println!("cargo::rerun-if-changed=../{input}");
    }
    if env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() != Ok("little") {
        return Err("netdp runs on little-endian machines only".into());
    }
    let variable = |name| env::var(name).map_err(|error| format!("read {name}: {error}"));
    let target_dir = PathBuf::from(variable("OUT_DIR")?).join("ebpf");
    let status = Command::new(variable("CARGO")?)
        .args(["build", "--quiet", "--release", "--package", "netdp-ebpf", "--target", TARGET])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        // The outer build may be clippy's.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .status()
        .map_err(|error| format!("start cargo for netdp-ebpf: {error}"))?;
    if !status.success() {
        return Err(
            "build netdp-ebpf: see above; `cargo xtask setup` installs what it needs".into()
        );
    }
    let object = target_dir.join(TARGET).join("release/netdp-ebpf");
    println!("cargo::rustc-env=NETDP_EBPF_OBJECT={}", object.display());
    Ok(())
}
