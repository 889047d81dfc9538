use std::{fs, time::Instant};

use jiff::{
    civil::date,
    tz::{TimeZone, offset},
};
use serde_json::json;
use test_support::alone::process_of;

use super::*;

/// A sandbox whose process is this program, which runs one test.
fn sandbox() -> Sandbox {
    Sandbox::new(|| Ok(process_of("text::sandbox::tests::the_process_of_other_tests")))
}

#[test]
#[ignore = "other tests start it"]
fn the_process_of_other_tests() {
    assert!(is_asked_for(), "other tests start it");
    answer();
}

impl Sandbox {
    fn writes(&self, source: &str) -> Answer {
        self.render(source, json!({"name": "é"}).as_object().unwrap(), None).unwrap()
    }

    fn process_id(&self) -> u32 {
        self.process.lock().unwrap().as_ref().expect("a process").child.id()
    }
}

#[test]
fn templates_run_in_one_process() {
    let sandbox = sandbox();
    assert_eq!(sandbox.writes("Hi {{ name }}").as_deref(), Ok("Hi é"));
    let process = sandbox.process_id();
    for index in 0..2 * KEPT {
        assert_eq!(sandbox.writes(&format!("{index} {{{{ name }}}}")), Ok(format!("{index} é")));
    }
    let now = date(2026, 7, 6).at(9, 5, 3, 0).to_zoned(TimeZone::fixed(offset(7))).unwrap();
    let written = sandbox.render("{{ strftime_now('%H %z') }}", &Map::new(), Some(&now)).unwrap();
    assert_eq!(written.as_deref(), Ok("09 +0700"));
    // Nothing of another template's is left.
    assert_eq!(sandbox.writes("{% set kept = 1 %}{{ kept }}").as_deref(), Ok("1"));
    assert_eq!(sandbox.writes("{{ kept is defined }}").as_deref(), Ok("False"));
    assert_eq!(sandbox.compile("{% if %}").unwrap().unwrap_err(), sandbox.writes("{% if %}").unwrap_err());
    assert_eq!(sandbox.compile("{{ raise_exception('no') }}").unwrap(), Ok(()));
    let raised = sandbox.writes("{{ raise_exception('no ' ~ name * 9999999) }}").unwrap_err();
    assert!(raised.starts_with("the model's chat template does not take these messages: no éé"), "{raised}");
    assert!(raised.ends_with("éé…") && raised.chars().count() < 5000);
    assert_eq!(sandbox.process_id(), process, "each was answered by the same one");
}

#[test]
fn a_process_that_was_killed_is_replaced() {
    let sandbox = sandbox();
    let mut last = 0;
    for _ in 0..3 {
        assert_eq!(sandbox.writes("{{ name }}").as_deref(), Ok("é"));
        assert_ne!(std::mem::replace(&mut last, sandbox.process_id()), last);
        sandbox.process.lock().unwrap().as_mut().unwrap().child.kill().unwrap();
        // As a signal of somebody else's, it is not waited for.
        let begin = Instant::now();
        while !fs::read_to_string(format!("/proc/{last}/stat")).unwrap().contains(") Z ") {
            assert!(begin.elapsed() < PATIENCE);
        }
    }
}

/// A loop of so many rounds, up to ten thousand millions, and what follows it.
fn rounds(count: u32, body: &str, then: &str) -> String {
    let inner = count.min(100_000);
    format!(
        "{{% set ns = namespace(x='ab') %}}{{% for i in range({}) %}}{{% for j in range({inner}) %}}{body}\
         {{% endfor %}}{{% endfor %}}{then}",
        count / inner
    )
}

#[test]
fn what_takes_too_much_memory_ends_its_process_alone() {
    let sandbox = sandbox();
    let is_refused = |source: &str| {
        let error = sandbox.writes(source).unwrap_err();
        assert_eq!(
            error, "the model's chat template takes more than 1 GiB of memory, or nests too deep",
            "{source}"
        );
        assert_eq!(sandbox.writes("{{ name }}").as_deref(), Ok("é"), "after {source}");
    };
    for body in [
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
        "{% set ns.x = ns.x | replace('a', ns.x) %}",
        "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}",
        "{% set ns.x = ns.x.replace('b', ns.x) %}",
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns.x = twice(ns.x) %}",
    ] {
        is_refused(&rounds(40, body, ""));
    }
    // Many that are small enough each, and folded where it is compiled.
    is_refused(&rounds(20, "{% set ns.x = [ns.x, 'a' * (99999900 + j)] %}", ""));
    is_refused(&format!("{{{{ ({} 'a') | length }}}}", "'a' * 99999999 ~ ".repeat(12)));
    // Deep lists, which are dropped, written, and compared.
    is_refused(&rounds(2_000_000, "{% set ns.x = [ns.x] %}", ""));
    is_refused(&rounds(100_000, "{% set ns.x = [ns.x] %}", "{{ ns.x }}"));
    is_refused(&rounds(100_000, "{% set ns.x = [ns.x] %}", "{{ ns.x | tojson }}"));
    is_refused(&rounds(100_000, "{% set ns.x = [ns.x] %}", "{{ ns.x == [[ns.x]] }}"));
}

#[test]
fn what_computes_too_long_ends_its_process_alone() {
    let sandbox = sandbox();
    for source in [
        // Few steps, of which each takes long.
        rounds(1_000_000, "{% set x = ns.y | length %}", "").replace("x='ab'", "y='a' * 9999999"),
        // Lists of 2^90 items to compare, of which few are there.
        rounds(90, "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}", "{{ ns.x == ns.y }}")
            .replace("x='ab'", "x='ab', y='ab'"),
    ] {
        let begin = Instant::now();
        assert_eq!(
            sandbox.writes(&source).unwrap_err(),
            "the model's chat template computes for more than 10 s",
            "{source}"
        );
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        assert_eq!(sandbox.writes("{{ name }}").as_deref(), Ok("é"));
    }
}

#[test]
fn no_process_is_an_error_until_there_is_one() {
    let sandbox = Sandbox::new(|| Ok(Command::new("/no/such/program")));
    let error = sandbox.render("{{ name }}", &Map::new(), None).unwrap_err().to_string();
    assert!(error.starts_with("the process of chat templates cannot be started: "), "{error}");
    // It ends, and answers nothing.
    let sandbox = Sandbox::new(|| Ok(Command::new("true")));
    let error = sandbox.writes("{{ name }}").unwrap_err();
    assert_eq!(error, "the model's chat template cannot be run: its process ended with exit status: 0");
    // It says something else.
    let sandbox = Sandbox::new(|| {
        let mut command = Command::new("sh");
        command.args(["-c", "echo Hello >&0"]);
        Ok(command)
    });
    let error = sandbox.writes("{{ name }}").unwrap_err();
    assert_eq!(error, "the model's chat template cannot be run: a message of kind 72");
}
