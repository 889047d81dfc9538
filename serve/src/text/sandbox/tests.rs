use std::{thread, time::Instant};

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
    fn writes(&self, source: &str) -> Result<String, String> {
        self.answers(source).map_err(|error| error.to_string())
    }

    fn answers(&self, source: &str) -> Result<String, ChatError> {
        self.render(source, json!({"name": "é"}).as_object().unwrap(), None)
    }

    /// The processes that wait.
    fn idle(&self) -> Vec<u32> {
        self.pool().idle.iter().map(|process| process.child.id()).collect()
    }
}

#[test]
fn templates_run_in_one_process() {
    let sandbox = sandbox();
    assert_eq!(sandbox.writes("Hi {{ name }}").as_deref(), Ok("Hi é"));
    let process = sandbox.idle();
    assert_eq!(process.len(), 1);
    for index in 0..2 * KEPT {
        assert_eq!(sandbox.writes(&format!("{index} {{{{ name }}}}")), Ok(format!("{index} é")));
    }
    let now = date(2026, 7, 6).at(9, 5, 3, 0).to_zoned(TimeZone::fixed(offset(7))).unwrap();
    let written = sandbox.render("{{ strftime_now('%H %z') }}", &Map::new(), Some(&now));
    assert_eq!(written.as_deref(), Ok("09 +0700"));
    // Nothing of another template's is left.
    assert_eq!(sandbox.writes("{% set kept = 1 %}{{ kept }}").as_deref(), Ok("1"));
    assert_eq!(sandbox.writes("{{ kept is defined }}").as_deref(), Ok("False"));
    let raised = sandbox.writes("{{ raise_exception('no ' ~ name * 9999999) }}").unwrap_err();
    assert!(raised.starts_with("the model's chat template does not take these messages: no éé"), "{raised}");
    assert!(raised.ends_with("éé…") && raised.chars().count() < 5000);
    let error = sandbox.answers("{% if %}").unwrap_err();
    assert_eq!(sandbox.idle(), process, "each was answered by the same one");
    // To compile, none is kept.
    assert_eq!(sandbox.compile("{% if %}"), Err(error));
    assert_eq!(sandbox.idle(), [0; 0]);
    assert_eq!(sandbox.compile("{{ raise_exception('no') }}"), Ok(()));
    assert_eq!(sandbox.idle(), [0; 0]);
}

#[test]
fn a_process_that_was_killed_is_replaced() {
    let sandbox = sandbox();
    let mut last = vec![];
    for _ in 0..3 {
        assert_eq!(sandbox.writes("{{ name }}").as_deref(), Ok("é"));
        assert_ne!(std::mem::replace(&mut last, sandbox.idle()), sandbox.idle());
        let mut pool = sandbox.pool();
        pool.idle[0].child.kill().unwrap();
        pool.idle[0].child.wait().unwrap();
    }
}

#[test]
fn templates_run_beside_each_other_in_few_processes() {
    let sandbox = sandbox();
    let long = rounds(300_000, "", "{{ name }}");
    thread::scope(|scope| {
        for index in 0..3 * PROCESSES {
            let (sandbox, long) = (&sandbox, &long);
            scope.spawn(move || {
                assert_eq!(sandbox.writes(&format!("{long}{index}")), Ok(format!("é{index}")))
            });
        }
    });
    assert_eq!(sandbox.idle().len(), PROCESSES);
    assert_eq!(sandbox.pool().busy, 0);
}

/// What they took may not be given back.
#[test]
fn a_process_is_not_kept_after_a_large_chat() {
    let sandbox = sandbox();
    for (bytes, kept) in [(KEPT_BYTES, 0), (KEPT_BYTES / 2, 1)] {
        let variables = json!({"text": "x".repeat(bytes)});
        let written = sandbox.render("{{ text | length }}", variables.as_object().unwrap(), None);
        assert_eq!(written, Ok(bytes.to_string()));
        assert_eq!(sandbox.idle().len(), kept);
    }
}

#[test]
fn variables_come_as_they_are() {
    let deep = (0..200).fold(json!(0.1), |inner, _| json!([inner]));
    let variables = json!({"numbers": [0.1, 1e23, 5e-324, 1.7976931348623157e308, -0.0, 9007199254740993_u64], "deep": deep});
    let written = sandbox().render("{{ numbers }}{{ deep }}", variables.as_object().unwrap(), None).unwrap();
    let expected = format!("{}0.1{}", "[".repeat(200), "]".repeat(200));
    assert_eq!(
        written,
        format!("[0.1, 1e+23, 5e-324, 1.7976931348623157e+308, -0.0, 9007199254740993]{expected}")
    );
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
    // The processor may be busy.
    let sandbox = Sandbox { patience: 10 * PATIENCE, ..sandbox() };
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
        assert!(begin.elapsed() < 10 * PATIENCE, "{:?}", begin.elapsed());
        assert_eq!(sandbox.writes("{{ name }}").as_deref(), Ok("é"));
    }
}

#[test]
fn processes_that_do_not_answer_are_not_the_templates_fault() {
    let error = |patience: Duration, program: fn() -> io::Result<Command>, source: &str| {
        let sandbox = Sandbox { patience, ..Sandbox::new(program) };
        let begin = Instant::now();
        let Err(ChatError::NotRun(error)) = sandbox.answers(source) else { panic!("it was run") };
        assert!(begin.elapsed() < 2 * PATIENCE);
        error.strip_prefix("the model's chat template cannot be run: ").unwrap().to_owned()
    };
    let missing = error(PATIENCE, || Ok(Command::new("/no/such/program")), "");
    assert!(missing.starts_with("its process cannot be started: "), "{missing}");
    assert_eq!(error(PATIENCE, || Ok(Command::new("true")), ""), "its process ended with exit status: 0");
    let killed = || {
        let mut command = Command::new("sh");
        command.args(["-c", "kill -KILL $$"]);
        Ok(command)
    };
    assert_eq!(error(PATIENCE, killed, ""), "its process ended with signal: 9 (SIGKILL)");
    let other = || {
        let mut command = Command::new("sh");
        command.args(["-c", "echo Hello >&0; exec sleep 1000"]);
        Ok(command)
    };
    assert_eq!(error(PATIENCE, other, ""), "a message of kind 72");
    let silent = || {
        let mut command = Command::new("sleep");
        command.arg("1000");
        Ok(command)
    };
    assert_eq!(error(Duration::from_secs(1), silent, ""), "it does not answer in time");
    assert_eq!(error(Duration::from_secs(1), silent, &"x".repeat(10_000_000)), "it does not answer in time");
}
