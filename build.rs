//! Tells the crate which commit it is built from: `BUILD_COMMIT`.
//!
//! `cargo run` hands the variable on to the program, which refuses `EREMOIS_` variables it does not know: it has
//! another beginning.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // In a debug build the commit would cost a rebuild of everything at each commit and tell its only reader nothing.
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = if release { commit().unwrap_or_else(|| "unknown".to_string()) } else { "debug".to_string() };
    println!("cargo:rustc-env=BUILD_COMMIT={commit}");
}

/// `None` outside git, or without git: a source archive builds as well.
fn commit() -> Option<String> {
    // A worktree keeps HEAD in one folder and the branches in another.
    for (folder, watched) in
        [("--git-dir", "HEAD"), ("--git-common-dir", "refs/heads"), ("--git-common-dir", "packed-refs")]
    {
        let path = Path::new(&git(&["rev-parse", folder])?).join(watched);
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_string())
}
