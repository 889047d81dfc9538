//! cargo puts the crate next door in candle-flash-attn's place.

use std::{env, path::Path, process::Command};

#[test]
fn candle_transformers_gets_the_crate_next_door() {
    let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["tree", "--offline", "--prefix=depth", "--invert", "candle-flash-attn"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    let next_door = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("candle-flash-attn");
    let mut lines = tree.lines();
    let expected = format!("0candle-flash-attn v0.11.1 ({})", next_door.display());
    assert_eq!(lines.next(), Some(expected.as_str()), "{tree}");
    assert!(lines.any(|line| line.starts_with("1candle-transformers v0.11.1")), "{tree}");
}
