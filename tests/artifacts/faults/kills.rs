//! Processes that are killed at every change of the cache, clocks that go back, and file systems of
//! networks, whose rename is done and said to have failed.

use super::*;
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

const SIGKILL: i32 = 9;
const EACCES: i32 = 13;
const ENOENT: i32 = 2;
const ESTALE: i32 = 116;

/// Starts a process that is killed at its `step`-th change of the cache.
fn killed_at(machine: &Machine, what: &str, step: usize) -> std::process::Child {
    machine.command(what, &[("FAULT_KILL", fault("/cache", &[step as i32]))]).spawn().unwrap()
}

/// Whether it was killed; if not, it did what it was to do.
fn was_killed(child: std::process::Child) -> bool {
    let output = child.wait_with_output().unwrap();
    let killed = output.status.signal() == Some(SIGKILL);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(killed || out.contains("DONE "), "{out}\n{}", String::from_utf8_lossy(&output.stderr));
    killed
}

/// Nothing that has a name to trust is another file.
fn assert_right(machine: &Machine, case: &str) {
    for file in machine.named(&|name| name == WHEEL) {
        assert!(fs::read(file).unwrap() == wheel(), "{case}: another wheel was published");
    }
    for file in machine.named(&|name| name == "norm.so") {
        assert!(fs::read(file).unwrap() == content(), "{case}: another module was published");
    }
}

/// The names of files, but for those of locks and the beginning of a stamp, which has no lock and goes
/// after a day.
fn names(machine: &Machine) -> BTreeSet<String> {
    let files = machine.named(&|name| !name.ends_with(".lock"));
    let begun = |file: &Path| {
        let in_wheels = file.parent().unwrap().ends_with("wheels");
        in_wheels
            && machine.temporaries().contains(&file.to_owned())
            && fs::metadata(file).unwrap().len() < 200
    };
    files
        .iter()
        .filter(|file| !begun(file))
        .map(|file| file.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

/// What is left in the cache after `what`, and nothing else.
fn expected(what: &str) -> BTreeSet<String> {
    let machine = Machine::new().unwrap();
    machine.act(what, &[]).0.unwrap();
    names(&machine)
}

#[test]
fn a_kill_at_any_change_leaves_what_the_next_process_mends() {
    const WHAT: &str = "locate";
    if shim().is_none() {
        return;
    }
    let expected = expected(WHAT);
    for step in 1.. {
        let machine = Machine::new().unwrap();
        let case = format!("killed at change {step}");
        let killed = was_killed(killed_at(&machine, WHAT, step));
        assert_right(&machine, &case);
        let path = machine.act(WHAT, &[]).0.unwrap_or_else(|e| panic!("{case}: {e}"));
        assert!(fs::read(path).unwrap() == content(), "{case}");
        assert_eq!(names(&machine), expected, "{case}");
        if !killed {
            println!("{} changes, a kill at each", step - 1);
            assert!(step > 5, "the changes were not seen");
            break;
        }
    }
}

#[test]
fn eight_processes_that_are_killed_leave_what_the_next_one_mends() {
    const PROCESSES: usize = 8;
    for what in ["locate", "by ranges", "extract", "unpack"] {
        if shim().is_none() {
            return;
        }
        let expected = expected(what);
        let mut first = 1;
        loop {
            let machine = Machine::new().unwrap();
            let children: Vec<_> =
                (0..PROCESSES).map(|number| killed_at(&machine, what, first + number)).collect();
            let killed = children.into_iter().map(was_killed).filter(|killed| *killed).count();
            let case = format!("{what}, killed at changes {first} to {}", first + PROCESSES - 1);
            assert_right(&machine, &case);
            let path = machine.act(what, &[]).0.unwrap_or_else(|e| panic!("{case}: {e}"));
            assert!(fs::read(path).unwrap() == content(), "{case}");
            assert_eq!(names(&machine), expected, "{case}");
            if killed == 0 {
                break;
            }
            first += PROCESSES;
        }
        assert!(first > 1, "{what}: nothing was killed");
    }
}

#[test]
fn a_killed_clean_is_ended_by_the_next_one() {
    for step in 1.. {
        let Some(machine) = Machine::new() else { return };
        machine.act("locate", &[]).0.unwrap();
        let killed = was_killed(killed_at(&machine, "clean", step));
        assert_right(&machine, &format!("clean, killed at change {step}"));
        machine.act("clean", &[]).0.unwrap();
        assert_eq!(names(&machine), BTreeSet::new(), "clean, killed at change {step}");
        machine.act("locate", &[]).0.unwrap();
        if !killed {
            assert!(step > 3, "the changes were not seen");
            break;
        }
    }
}

#[test]
fn a_rename_that_is_done_and_said_to_have_failed_costs_no_download() {
    for errno in [ENOENT, ESTALE, EIO] {
        let Some(machine) = Machine::new() else { return };
        let renamed = [("FAULT_RENAME", fault(".whl$", &[errno]))];
        let text = machine.act("fetch", &renamed).0.unwrap_err();
        assert!(text.contains("publish") && text.contains(WHEEL), "{text}");
        let renamed = [("FAULT_RENAME", fault("norm.so$", &[errno]))];
        let text = machine.act("locate", &renamed).0.unwrap_err();
        assert!(text.contains("publish") && text.contains("norm.so"), "{text}");
        let path = machine.act("locate", &[]).0.unwrap();
        assert!(fs::read(path).unwrap() == content());
        assert_eq!(machine.server.count(), 1);
        assert_eq!(names(&machine), expected("locate"));
    }
}

#[test]
fn a_folder_that_may_not_be_written_is_told() {
    let Some(machine) = Machine::new() else { return };
    let refused = [("FAULT_OPEN", fault("/cache", &[EACCES]))];
    let text = machine.act("locate", &refused).0.unwrap_err();
    assert!(text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
    machine.act("locate", &[]).0.unwrap();
    machine.act("extract", &[]).0.unwrap();
    for what in ["fetch", "locate", "locate cached", "extract"] {
        machine.act(what, &refused).0.unwrap();
    }
}

#[test]
fn space_that_comes_back_is_used() {
    let Some(machine) = Machine::new() else { return };
    // The disk is full at each attempt, each time a bit later.
    for attempt in 1..3 {
        let full = [("FAULT_WRITE", fault(".partial", &[300_000, ENOSPC, 99]))];
        machine.act("fetch", &full).0.unwrap_err();
        let left = machine.named(&|name| name.ends_with(".partial"));
        assert!(wheel().starts_with(&fs::read(&left[0]).unwrap()), "attempt {attempt}");
    }
    let path = machine.act("fetch", &[]).0.unwrap();
    assert!(fs::read(path).unwrap() == wheel());
}

#[test]
fn a_clock_that_was_set_back_changes_nothing_that_is_served() {
    let Some(machine) = Machine::new() else { return };
    machine.act("locate", &[]).0.unwrap();
    let later = SystemTime::now() + Duration::from_secs(10 * 365 * 24 * 60 * 60);
    for file in machine.named(&|_| true) {
        fs::File::options().write(true).open(file).unwrap().set_modified(later).unwrap();
    }
    let folder = machine.named(&|name| name == "norm.so")[0].parent().unwrap().to_owned();
    let left = folder.join(".tmp-flashinfer-rs-1-0");
    fs::File::create(&left).unwrap().set_modified(later).unwrap();
    for what in ["locate cached", "fetch", "locate", "extract"] {
        machine.act(what, &[]).0.unwrap();
    }
    assert_eq!(machine.server.count(), 1);
    // Also without locks, where time alone tells that nobody writes.
    let lockless = [("FAULT_FLOCK", ENOLCK.to_string())];
    machine.act("clean", &lockless).0.unwrap();
    assert_eq!(names(&machine), BTreeSet::new());
    assert!(!left.exists());
}
