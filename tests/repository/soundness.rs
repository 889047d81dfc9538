//! Every row of `docs/soundness.md` names tests that there are.

use std::{collections::BTreeSet, fs, io, path::Path};

const SOUNDNESS: &str = include_str!("../../docs/soundness.md");

/// The last column names files, and after each the tests in it:
/// `` `tests/kv.rs`: `threads`, `short_schedules`; `src/kv/pages.rs`: … ``.
#[test]
fn every_row_names_tests_that_there_are() {
    let mut problems = Vec::new();
    let mut rows = 0;
    for (number, line) in SOUNDNESS.lines().enumerate() {
        if !line.starts_with('|') || line.starts_with("|---") || line.starts_with("| # |") {
            continue;
        }
        rows += 1;
        let column = line.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        problems.extend(problems_of(column).into_iter().map(|it| format!("line {}: {it}", number + 1)));
    }
    assert!(rows > 200, "{rows} rows are not all of them");
    assert!(problems.is_empty(), "docs/soundness.md\n{}", problems.join("\n"));
}

/// What is wrong with the last column of a row.
fn problems_of(column: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut file, mut tests) = (None, 0);
    // Every second part is between backticks.
    for name in column.split('`').skip(1).step_by(2) {
        if name.contains('/') {
            match tests_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join(name)) {
                Ok(tests) => file = Some((name, tests)),
                Err(error) => problems.push(format!("`{name}`: {error}")),
            }
            continue;
        }
        tests += 1;
        match &file {
            None => problems.push(format!("`{name}` stands before the file that it is in")),
            Some((_, there)) if there.contains(name) => {}
            Some((file, _)) => problems.push(format!("`{file}` has no test `{name}`")),
        }
    }
    if tests == 0 {
        problems.push(format!("no test in `{}`", column.trim()));
    }
    problems
}

/// The tests of a file, and of its modules in the folder of its name.
fn tests_of(file: &Path) -> io::Result<BTreeSet<String>> {
    let mut tests = tests_in(&fs::read_to_string(file)?);
    let folder = file.with_extension("");
    if file.starts_with(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")) && folder.is_dir() {
        for module in fs::read_dir(folder)? {
            tests.append(&mut tests_of(&module?.path())?);
        }
    }
    Ok(tests)
}

/// A line, without what stands before the code of an example.
fn example(line: &str) -> &str {
    let line = line.trim();
    line.strip_prefix("/// ").unwrap_or(line).trim_start_matches("# ")
}

/// The tests of a source file: functions under `#[test]`, those that macros
/// make of lines such as `name: method();` or of `prefill_tests!(Kind: name,
/// name);`, and examples that must not compile.
fn tests_in(text: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    let mut of_a_test = false;
    for line in text.lines().map(example) {
        if let Some((name, _)) = line.strip_prefix("fn ").and_then(|rest| rest.split_once(['(', '<'])) {
            if of_a_test {
                tests.insert(name.to_owned());
            }
            of_a_test = false;
        } else if let Some((_, names)) =
            line.strip_prefix("prefill_tests!(").and_then(|rest| rest.strip_suffix(");")?.split_once(": "))
        {
            tests.extend(names.split(", ").map(str::to_owned));
        } else if let Some((name, _)) = line.strip_suffix(';').and_then(|line| line.split_once(": ")) {
            if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                tests.insert(name.to_owned());
            }
        } else if line == "#[test]" || line.starts_with("```compile_fail") {
            of_a_test = true;
        }
    }
    tests
}
