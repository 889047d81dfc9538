//! Tests that look at the whole process, which runs nothing else then.

use std::{
    env, fs,
    process::{Command, Output},
};

/// The test that a process runs alone.
const ALONE: &str = "TEST_ALONE";

/// Whether this process runs nothing but this test, of its full name. If not, one that does is started, and
/// must pass.
#[track_caller]
pub fn is_alone(test: &str) -> bool {
    if env::var(ALONE).is_ok_and(|alone| alone == test) {
        return true;
    }
    let output = process_of(test).env(ALONE, test).output().unwrap();
    eprintln!("{}", assert_passed(&output));
    false
}

/// A process of this program that runs nothing but this test, of its full name.
pub fn process_of(test: &str) -> Command {
    let mut process = Command::new(env::current_exe().unwrap());
    process.args([test, "--exact", "--include-ignored", "--nocapture"]);
    process
}

/// Asserts that a process had a test to run, which passed; what it said.
#[track_caller]
pub fn assert_passed(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}", output.status);
    text
}

/// Resident memory of this process, in bytes. On Linux only.
pub fn resident() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
