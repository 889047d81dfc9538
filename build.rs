//! Embeds the chosen kernel modules. The work is in `src/artifacts`, which the library shares.

#[allow(dead_code, unused_imports)]
#[path = "src/artifacts/mod.rs"]
mod artifacts;

fn main() {
    if let Err(reason) = artifacts::embed::main() {
        println!("cargo::error={}", reason.replace('\n', " "));
        std::process::exit(1);
    }
}
