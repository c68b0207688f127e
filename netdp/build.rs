//! Builds the eBPF object that the agent carries.
//!
//! A stable compiler builds `core` for the BPF target when told to with `RUSTC_BOOTSTRAP`; the
//! setting reaches this one nested build and nothing else.

use std::{env, path::PathBuf, process::Command};

const TARGET: &str = "bpfel-unknown-none";

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
        // Debug information becomes BTF, without which the kernel refuses some programs.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Cdebuginfo=2\x1f-Clink-arg=--btf")
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
