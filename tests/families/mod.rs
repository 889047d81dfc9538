//! The table of module families in `docs/modules.md`.
#![allow(dead_code, reason = "each test file uses its own part")]

use flashinfer_rs::ModuleName;

/// One row.
#[derive(Debug)]
pub struct Family {
    pub patterns: Vec<&'static str>,
    /// Modules of 0.6.13 for all architectures, and of 0.7.4 for 9.0.
    pub counts: [usize; 2],
    pub here: &'static str,
}

impl Family {
    pub fn holds(&self, module: &ModuleName) -> bool {
        self.patterns.iter().any(|pattern| module.matches(pattern))
    }

    /// Whether the crate declares functions of the family.
    pub fn is_declared(&self) -> bool {
        let not = ["not yet", "not here", "not called"];
        !not.iter().any(|not| self.here.starts_with(not))
    }
}

/// Whether the table of functions that are not called has this one.
pub fn is_uncalled(module: &ModuleName, function: &str) -> bool {
    let rows = include_str!("../../docs/modules.md").lines().filter(|line| line.starts_with("| 0."));
    rows.map(|row| row.split(" | ").map(|cell| cell.split('`').skip(1).step_by(2)).collect::<Vec<_>>()).any(
        |mut cells| {
            let (functions, patterns) = (cells.remove(2), cells.remove(1));
            patterns.into_iter().any(|pattern| module.matches(pattern))
                && functions.into_iter().any(|uncalled| uncalled == function)
        },
    )
}

/// All rows.
pub fn families() -> Vec<Family> {
    let rows = include_str!("../../docs/modules.md").lines().filter(|line| line.starts_with("| `"));
    let family = |row: &'static str| {
        let mut cells = row.split(" | ");
        let patterns = cells.next().unwrap().split('`').skip(1).step_by(2).collect();
        let counts = [(); 2].map(|()| cells.next().unwrap().parse().expect("a number of modules"));
        Family { patterns, counts, here: cells.next().unwrap() }
    };
    rows.map(family).collect()
}
