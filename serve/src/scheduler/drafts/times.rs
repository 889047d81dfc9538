//! What steps take with drafts and without, and so whether drafts pay.

use std::time::Duration;

/// Steps of which the shortest counts, as first ones make graphs and choose algorithms.
const FIRST: u32 = 4;
/// How much a later step counts beside all before it, and how many times their time at most.
const WEIGHT: f64 = 0.25;
const LONGEST: f64 = 2.0;
/// How much of what drafts cost is forgotten in a step that has none because of it, at first and after many
/// times that they were tried again and did not pay: half as much each time, so that trying costs nothing in
/// the long run.
const FORGOTTEN: f64 = 1.0 / 512.0;
const LEAST_FORGOTTEN: f64 = FORGOTTEN / 32.0;
/// As many steps in a row with drafts are more than a try.
const TRIES: u32 = 32;

/// What a step takes, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    seconds: f64,
    steps: u32,
}

impl Estimate {
    fn observe(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        self.seconds = match self.steps {
            0 => took,
            1..FIRST => self.seconds.min(took),
            _ => self.seconds + (took.min(self.seconds * LONGEST) - self.seconds) * WEIGHT,
        };
        self.steps = self.steps.saturating_add(1);
    }

    fn is_known(self) -> bool {
        self.steps >= FIRST
    }
}

/// How many tokens of a step's drafts are right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Right {
    /// By what was known of the answers before.
    pub expected: f64,
    /// In fact.
    pub counted: f64,
}

impl Right {
    /// How much a step counts beside all before it.
    const WEIGHT: f64 = 1.0 / 16.0;

    fn observe(&mut self, step: Self) {
        self.expected += (step.expected - self.expected) * Self::WEIGHT;
        self.counted += (step.counted - self.counted) * Self::WEIGHT;
    }
}

/// A step in which all answers decode, whose time tells something.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    pub answers: usize,
    pub drafts: Drafts,
}

/// What drafts a step had.
#[derive(Clone, Copy, Debug)]
pub enum Drafts {
    /// None, and it would have been the same if there never were any.
    None,
    /// These.
    Some(Right),
    /// None, but it was not enqueued ahead because of drafts. What that takes is theirs.
    WaitedFor,
}

/// Steps of one size.
#[derive(Clone, Copy, Debug)]
struct Times {
    plain: Estimate,
    drafted: Estimate,
    right: Right,
    /// For how many steps in a row drafts have paid.
    paid: u32,
    forgotten: f64,
}

impl Default for Times {
    fn default() -> Self {
        let right = Right { expected: 1.0, counted: 1.0 };
        Self {
            plain: Estimate::default(),
            drafted: Estimate::default(),
            right,
            paid: 0,
            forgotten: FORGOTTEN,
        }
    }
}

/// What steps take in which all answers decode, by the power of two of how many they are.
#[derive(Debug, Default)]
pub struct StepTimes(Vec<Times>);

impl StepTimes {
    /// A step took that long.
    pub fn observe(&mut self, step: Timed, took: Duration) {
        let Times { plain, drafted, right, .. } = self.of(step.answers);
        match step.drafts {
            Drafts::None => plain.observe(took),
            Drafts::Some(of_step) => {
                drafted.observe(took);
                right.observe(of_step);
            }
            Drafts::WaitedFor if plain.is_known() => {
                drafted.seconds += (took.as_secs_f64() - plain.seconds).max(0.0) * WEIGHT;
            }
            Drafts::WaitedFor => {}
        }
    }

    /// Whether a step of so many answers is to have drafts, of which so many tokens should be
    /// right: whether tokens come faster than without. Such expectations are corrected by what
    /// became of earlier ones. As long as either time is not known, it is found out.
    pub fn pays(&mut self, answers: usize, expected: f64) -> bool {
        let Times { plain, drafted, right, paid, forgotten } = self.of(answers);
        if !drafted.is_known() || !plain.is_known() {
            return !drafted.is_known();
        }
        let (answers, expected) = (answers as f64, expected * right.counted / right.expected);
        if drafted.seconds * answers <= plain.seconds * (answers + expected) {
            *paid += 1;
            if *paid >= TRIES {
                *forgotten = FORGOTTEN;
            }
            return true;
        }
        if (1..TRIES).contains(paid) {
            *forgotten = (*forgotten / 2.0).max(LEAST_FORGOTTEN);
        }
        *paid = 0;
        // They are tried again after a while.
        drafted.seconds -= (drafted.seconds - plain.seconds).max(0.0) * *forgotten;
        right.counted += (right.expected - right.counted).max(0.0) * *forgotten;
        false
    }

    fn of(&mut self, answers: usize) -> &mut Times {
        let size = answers.max(1).ilog2() as usize;
        if self.0.len() <= size {
            self.0.resize(size + 1, Times::default());
        }
        &mut self.0[size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Timed = Timed { answers: 1, drafts: Drafts::None };
    const DRAFTED: Timed = Timed { answers: 1, drafts: Drafts::Some(Right { expected: 0.5, counted: 0.5 }) };

    /// A step of one answer, with drafts that take so long if they pay.
    fn step(times: &mut StepTimes, drafted: u64) -> bool {
        let pays = times.pays(1, 0.5);
        match pays {
            true => times.observe(DRAFTED, ms(drafted)),
            false => times.observe(PLAIN, ms(10)),
        }
        pays
    }

    const fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    #[test]
    fn drafts_pay_where_tokens_come_faster() {
        let mut times = StepTimes::default();
        assert!(times.pays(1, 0.1));
        // The first steps are slow for other reasons.
        for (drafted, plain) in [(900, 700), (20, 10), (20, 10), (20, 10)] {
            times.observe(DRAFTED, ms(drafted));
            times.observe(PLAIN, ms(plain));
        }
        assert!(times.pays(1, 1.1) && !times.pays(1, 0.9));
        // Of four answers, two tokens have to be right as often.
        for _ in 0..4 {
            assert!(times.pays(4, 0.1));
            times.observe(Timed { answers: 4, ..DRAFTED }, ms(15));
            times.observe(Timed { answers: 5, ..PLAIN }, ms(10));
        }
        assert!(times.pays(4, 2.1) && !times.pays(4, 1.9));
    }

    #[test]
    fn what_did_not_pay_is_tried_again_and_rarely() {
        let mut times = StepTimes::default();
        let mut tried = 0;
        for _ in 0..10_000 {
            let drafted = step(&mut times, 20);
            tried += usize::from(drafted);
        }
        assert!((8..30).contains(&tried), "{tried}");
        // Ten times as many steps try them hardly more often.
        let more = (0..100_000).filter(|_| step(&mut times, 20)).count();
        assert!(more < 30, "{more}");
        // Now they are cheap, which is found out once they are tried.
        assert!((0..100_000).any(|_| step(&mut times, 11)));
        assert!((0..100).all(|_| step(&mut times, 11)));
        // From then on, they are tried as often as at first when they do not pay any more.
        assert!((0..200).any(|_| !step(&mut times, 20)));
        let tried = (0..2000).filter(|_| step(&mut times, 20)).count();
        assert!((3..30).contains(&tried), "{tried}");
    }

    #[test]
    fn steps_that_wait_for_drafts_count_against_them() {
        let mut times = StepTimes::default();
        for _ in 0..4 {
            times.observe(PLAIN, ms(10));
            times.observe(DRAFTED, ms(14));
        }
        assert!(times.pays(1, 0.5));
        times.observe(Timed { answers: 1, drafts: Drafts::WaitedFor }, ms(18));
        assert!(!times.pays(1, 0.5) && times.pays(1, 0.7));
    }

    #[test]
    fn expectations_that_fail_count_less() {
        let mut times = StepTimes::default();
        for _ in 0..4 {
            times.observe(PLAIN, ms(10));
            times.observe(DRAFTED, ms(15));
        }
        assert!(times.pays(1, 0.6));
        let mut steps = 0;
        while times.pays(1, 0.6) {
            let drafts = Drafts::Some(Right { expected: 0.6, counted: 0.2 });
            times.observe(Timed { answers: 1, drafts }, ms(15));
            steps += 1;
        }
        assert!((5..50).contains(&steps) && times.pays(1, 3.0), "{steps}");
    }
}
