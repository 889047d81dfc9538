//! What steps take with drafts and without, and so whether drafts pay.

use std::{mem, time::Duration};

/// Steps of which the shortest counts, as first ones make graphs and choose algorithms.
const FIRST: u32 = 4;
/// How much a later step counts beside all before it, and how many times their time at most.
const WEIGHT: f64 = 0.25;
const LONGEST: f64 = 2.0;
/// How much of what drafts cost is forgotten in a step that has none because of it: at first, and after many
/// times that they were tried again and lost. It is half as much each time.
const FORGOTTEN: f64 = 1.0 / 512.0;
const LEAST_FORGOTTEN: f64 = FORGOTTEN / 8.0;

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

/// Steps with drafts since the last one that was to have none.
#[derive(Clone, Copy, Debug, Default)]
struct Try {
    steps: u32,
    /// The seconds, of each answer, that they took less than as many tokens without drafts.
    gained: f64,
}

/// Steps of one size.
#[derive(Clone, Copy, Debug)]
struct Times {
    plain: Estimate,
    drafted: Estimate,
    right: Right,
    tried: Try,
    forgotten: f64,
}

impl Default for Times {
    fn default() -> Self {
        let right = Right { expected: 1.0, counted: 1.0 };
        let (plain, drafted, tried) = Default::default();
        Self { plain, drafted, right, tried, forgotten: FORGOTTEN }
    }
}

impl Times {
    /// Steps with drafts are over for now: those that lost are tried again later than the last time.
    fn end_try(&mut self) {
        let Try { steps, gained } = mem::take(&mut self.tried);
        self.forgotten = match steps {
            0 => self.forgotten,
            _ if gained < 0.0 => (self.forgotten / 2.0).max(LEAST_FORGOTTEN),
            _ => FORGOTTEN,
        };
    }
}

/// What steps take in which all answers decode, by the power of two of how many they are.
#[derive(Debug, Default)]
pub struct StepTimes(Vec<Times>);

impl StepTimes {
    /// A step took that long.
    pub fn observe(&mut self, step: Timed, took: Duration) {
        let answers = step.answers as f64;
        let Times { plain, drafted, right, tried, .. } = self.of(step.answers);
        let took_longer = took.as_secs_f64() - plain.seconds;
        match step.drafts {
            Drafts::None => plain.observe(took),
            Drafts::Some(of_step) => {
                if plain.is_known() && drafted.is_known() {
                    tried.steps += 1;
                    tried.gained += plain.seconds * of_step.counted / answers - took_longer;
                }
                drafted.observe(took);
                right.observe(of_step);
            }
            Drafts::WaitedFor if plain.is_known() => {
                drafted.seconds += took_longer.max(0.0) * WEIGHT;
                tried.gained -= took_longer.max(0.0);
            }
            Drafts::WaitedFor => {}
        }
    }

    /// Whether a step of so many answers is to have drafts, of which so many tokens should be
    /// right: whether tokens come faster than without. Such expectations are corrected by what
    /// became of earlier ones. As long as either time is not known, it is found out.
    pub fn pays(&mut self, answers: usize, expected: f64) -> bool {
        let times = self.of(answers);
        let Times { plain, drafted, right, .. } = *times;
        if !drafted.is_known() || !plain.is_known() {
            return !drafted.is_known();
        }
        let (answers, expected) = (answers as f64, expected * right.counted / right.expected);
        if drafted.seconds * answers <= plain.seconds * (answers + expected) {
            return true;
        }
        times.end_try();
        // They are tried again after a while.
        let Times { drafted, right, forgotten, .. } = times;
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

    /// Of steps of one answer that take 10 ms, and with drafts so many.
    fn known(drafted: u64) -> StepTimes {
        let mut times = StepTimes::default();
        for _ in 0..FIRST {
            times.observe(PLAIN, ms(10));
            times.observe(DRAFTED, ms(drafted));
        }
        times
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
        let mut tried = |steps, took| (0..steps).filter(|_| step(&mut times, took)).count();
        let (first, later) = (tried(2000, 20), tried(20_000, 20));
        assert!((5..30).contains(&first) && (5..60).contains(&later), "{first}, {later}");
        // Now they are cheap, which is found out once they are tried.
        assert!(tried(5000, 11) > 1000);
        assert_eq!(tried(100, 11), 100);
        // From then on, they are tried as often as at first when they do not pay any more.
        let again = tried(2000, 20);
        assert!((5..30).contains(&again), "{again}");
    }

    /// Text of which drafts are right, and then other text: what is forgotten stays as it was.
    #[test]
    fn drafts_that_paid_for_a_while_are_tried_as_soon() {
        let mut times = known(14);
        for _ in 0..10 {
            for _ in 0..10 {
                assert!(times.pays(1, 2.0));
                let drafts = Drafts::Some(Right { expected: 2.0, counted: 2.0 });
                times.observe(Timed { answers: 1, drafts }, ms(14));
            }
            assert!(!times.pays(1, 0.1));
            // Neither does it count that there was nothing to draft after all.
            (0..10).for_each(|_| assert!(times.pays(1, 2.0)));
            assert!(!times.pays(1, 0.1));
        }
        assert_eq!(times.of(1).forgotten, FORGOTTEN);
    }

    #[test]
    fn steps_that_wait_for_drafts_count_against_them() {
        let mut times = known(14);
        assert!(times.pays(1, 0.5));
        times.observe(Timed { answers: 1, drafts: Drafts::WaitedFor }, ms(18));
        assert!(!times.pays(1, 0.5) && times.pays(1, 0.7));
    }

    #[test]
    fn expectations_that_fail_count_less() {
        let mut times = known(15);
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
