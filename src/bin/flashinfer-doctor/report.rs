//! Findings, and how they are printed.

use std::io::{self, Write};

use serde::Serialize;

/// How many details of a finding that is not ok are printed unless all are asked for.
const SHOWN_DETAILS: usize = 4;

/// How good or bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something does not work that kernels can do without.
    Warning,
    /// Kernels cannot run because of it.
    Problem,
}

impl Status {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "PROBLEM",
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    status: Status,
    text: String,
    /// What to do about it.
    remedy: Option<String>,
    /// A list that belongs to it, such as names of modules.
    details: Vec<String>,
}

impl Finding {
    /// Something that is as it should be.
    pub fn ok(text: impl Into<String>) -> Self {
        Self { status: Status::Ok, text: text.into(), remedy: None, details: Vec::new() }
    }

    /// Something that does not work and is not needed.
    pub fn warning(text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Warning, remedy: Some(remedy.into()), ..Self::ok(text) }
    }

    /// Something that keeps kernels from running.
    pub fn problem(text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Problem, ..Self::warning(text, remedy) }
    }

    /// The finding with a list.
    pub fn with_details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }
}

/// Findings about one subject.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    title: &'static str,
    findings: Vec<Finding>,
}

/// Everything that was found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    sections: Vec<Section>,
}

impl Report {
    /// Adds a section.
    pub fn add(&mut self, title: &'static str, findings: Vec<Finding>) {
        self.sections.push(Section { title, findings });
    }

    fn count(&self, status: Status) -> usize {
        let findings = self.sections.iter().flat_map(|section| &section.findings);
        findings.filter(|finding| finding.status == status).count()
    }

    /// Whether nothing that is needed is missing.
    pub fn kernels_can_run(&self) -> bool {
        self.count(Status::Problem) == 0
    }

    /// Prints the report for programs.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kernels_can_run": self.kernels_can_run(),
            "sections": self.sections,
        });
        writeln!(out, "{json:#}")
    }

    /// Prints the report for people; `verbose` prints lists in full.
    pub fn write_text(&self, out: &mut impl Write, verbose: bool) -> io::Result<()> {
        writeln!(out, "flashinfer-doctor {}", env!("CARGO_PKG_VERSION"))?;
        for section in &self.sections {
            writeln!(out, "\n{}", section.title)?;
            for finding in &section.findings {
                write_finding(out, finding, verbose)?;
            }
        }
        let (problems, warnings) = (self.count(Status::Problem), self.count(Status::Warning));
        let verdict = if self.kernels_can_run() { "Kernels can run here" } else { "Kernels cannot run here" };
        writeln!(out, "\n{verdict}: {}, {}.", counted(problems, "problem"), counted(warnings, "warning"))
    }
}

fn write_finding(out: &mut impl Write, finding: &Finding, verbose: bool) -> io::Result<()> {
    let indent = "\n            ";
    writeln!(out, "  {:<8}  {}", finding.status.label(), finding.text.replace('\n', indent))?;
    if let Some(remedy) = &finding.remedy {
        writeln!(out, "            -> {}", remedy.replace('\n', indent))?;
    }
    let details = &finding.details;
    let shown = match finding.status {
        _ if verbose => details.len(),
        Status::Ok => return Ok(()),
        // One more is no longer than the line that would tell of it.
        _ if details.len() == SHOWN_DETAILS + 1 => details.len(),
        _ => details.len().min(SHOWN_DETAILS),
    };
    for detail in &details[..shown] {
        writeln!(out, "              {}", detail.replace('\n', "\n              "))?;
    }
    match details.len() - shown {
        0 => Ok(()),
        more => writeln!(out, "              … and {more} more (--verbose lists all)"),
    }
}

/// A number and what it counts.
pub fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
