//! The steps of a rule.

use std::ops::Range;

use regex_automata::{Input, meta::Regex};

use crate::Result;

/// What is looked for in a text.
#[derive(Clone, Copy)]
pub enum Step {
    /// A pattern, wherever it is.
    Pattern(&'static str),
    /// A pattern, or else blanks. If more than one are before something else, the last is
    /// left to it.
    Words(&'static str),
    /// Places in digits before groups of three, counted from the right.
    Thousands,
}

/// A step with its compiled pattern.
struct Compiled {
    step: Step,
    regex: Regex,
}

/// A rule, ready to be used.
pub struct Splits(Vec<Compiled>);

impl Splits {
    pub(super) fn new(steps: &[Step]) -> Result<Self> {
        let compile = |&step: &Step| {
            let regex = match step {
                Step::Pattern(pattern) => Regex::new(pattern),
                // The first has precedence.
                Step::Words(pattern) => Regex::new_many(&[pattern, r"\s+"]),
                Step::Thousands => Regex::new(r"\d+"),
            };
            regex.map(|regex| Compiled { step, regex }).map_err(Into::into)
        };
        Ok(Self(steps.iter().map(compile).collect::<Result<_>>()?))
    }

    /// Calls `part` with each part of a text.
    pub fn each<'t>(&self, text: &'t str, mut part: impl FnMut(&'t str)) {
        split(&self.0, text, &mut part);
    }
}

fn split<'t>(steps: &[Compiled], text: &'t str, part: &mut dyn FnMut(&'t str)) {
    let Some((first, rest)) = steps.split_first() else {
        if !text.is_empty() {
            part(text);
        }
        return;
    };
    let mut last = 0;
    first.each_cut(text, &mut |found: Range<usize>| {
        split(rest, &text[last..found.start], part);
        split(rest, &text[found.clone()], part);
        last = found.end;
    });
    split(rest, &text[last..], part);
}

impl Compiled {
    /// Calls `found` with each range that stands alone.
    fn each_cut(&self, text: &str, found: &mut dyn FnMut(Range<usize>)) {
        let mut at = 0;
        while let Some(hit) = self.regex.search(&Input::new(text).range(at..)) {
            let mut range = hit.range();
            at = range.end;
            match self.step {
                Step::Pattern(_) => {}
                Step::Words(_) => {
                    let blanks = hit.pattern().as_usize() == 1;
                    if blanks && range.end < text.len() {
                        let last = text[range.clone()].char_indices().next_back().map_or(0, |(at, _)| at);
                        if last > 0 {
                            range.end = range.start + last;
                            at = range.end;
                        }
                    }
                }
                Step::Thousands => {
                    let digits = &text[range.clone()];
                    let over = digits.chars().count() % 3;
                    let places = digits.char_indices().map(|(place, _)| place).skip(over).step_by(3);
                    for place in places {
                        found(range.start + place..range.start + place);
                    }
                    continue;
                }
            }
            found(range);
        }
    }
}
