//! What the tests of GDN prefill share: batches with realistic numbers,
//! comparison with the CPU reference, and the watchdog.

use std::{
    panic::resume_unwind,
    process::abort,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use flashinfer_rs::{
    DType, ModuleName, Result, TensorMut,
    gdn::{GdnInput, GdnOptions, GdnOutput, GdnWorkspace, InitialState, gdn_prefill},
    indices::{SequenceIndices, SequenceTable},
    reference,
};

use super::{Gpu, Mirrored, Number, Rng, at_hand, say};

/// The head dimension of the kernel.
pub const D: usize = 128;
const LIMIT: Duration = Duration::from_secs(60);

/// Whether the module is; if not, where it may be missing, it is said on stderr.
pub fn is_at_hand(gpu: &Gpu) -> bool {
    at_hand(gpu, gpu.runtime.preload([&ModuleName::GDN_PREFILL_SM90])).is_some()
}

/// Runs a test in a thread of its own, under a watchdog: a kernel that hangs
/// cannot be stopped, so after a minute the process ends and says why.
/// The clock starts when the GPU is there and the module is loaded.
pub fn watched(body: fn(&Gpu, &mut Rng)) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let (done, progress) = channel();
    let test = thread::Builder::new().name(name).spawn(move || {
        let Some(gpu) = Gpu::start() else { return };
        if !is_at_hand(&gpu) {
            return;
        }
        done.send(()).expect("the watchdog listens");
        body(&gpu, &mut Rng::new());
        gpu.synchronize();
    });
    let test = test.expect("a thread");
    // What the thread owns is dropped at its end, `done` last.
    if progress.recv().is_ok() && progress.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
        say(&format!("HANG DETECTED: not done after {LIMIT:?}"));
        abort();
    }
    if let Err(panic) = test.join() {
        resume_unwind(panic);
    }
}

/// A shape of batch.
#[derive(Clone, Debug)]
pub struct Case {
    pub lens: Vec<usize>,
    /// Of queries, keys and values.
    pub heads: [usize; 3],
    pub alpha: bool,
    pub beta: bool,
    /// Whether sequences start from a given state.
    pub state: bool,
    pub scale: Option<f64>,
}

impl Case {
    /// Both gates, no initial state, the default scale.
    pub fn new(lens: &[usize], heads: [usize; 3]) -> Self {
        Self { lens: lens.to_vec(), heads, alpha: true, beta: true, state: false, scale: None }
    }

    /// All that the kernel can be given.
    pub fn all_options(lens: &[usize], heads: [usize; 3]) -> Self {
        Self { state: true, scale: Some(0.37), ..Self::new(lens, heads) }
    }

    pub fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    pub fn state_heads(&self) -> usize {
        self.heads[0].max(self.heads[2])
    }

    pub fn output_shape(&self) -> [usize; 3] {
        [self.tokens(), self.state_heads(), D]
    }

    pub fn state_shape(&self) -> [usize; 4] {
        [self.lens.len(), self.state_heads(), D, D]
    }

    pub fn indices(&self) -> SequenceIndices {
        SequenceIndices::from_lens(self.lens.iter().copied()).unwrap()
    }

    pub fn table(&self, gpu: &Gpu) -> SequenceTable {
        SequenceTable::new(&gpu.stream, self.indices()).unwrap()
    }

    pub fn options(&self) -> GdnOptions {
        self.scale.map_or_else(GdnOptions::default, GdnOptions::with_scale)
    }
}

/// Where a run starts from.
pub enum Start<'a> {
    Zeros,
    From(&'a Mirrored<f32>),
    InPlace,
}

/// A batch: small queries, keys of norm 1, values of variance 1, alpha in
/// (0.8, 1), beta in (0, 1), as in models.
pub struct Problem<T> {
    pub case: Case,
    pub q: Mirrored<T>,
    pub k: Mirrored<T>,
    pub v: Mirrored<T>,
    pub alpha: Option<Mirrored<f32>>,
    pub beta: Option<Mirrored<f32>>,
    pub state: Option<Mirrored<f32>>,
}

/// What a run wrote, or will write.
pub struct Results<T> {
    pub output: Mirrored<T>,
    pub state: Mirrored<f32>,
}

/// What the reference says.
pub struct Expected {
    pub output: Vec<f64>,
    pub state: Vec<f64>,
}

impl<T: Number> Results<T> {
    /// Nothing but NaN.
    pub fn poisoned(gpu: &Gpu, case: &Case) -> Self {
        Self {
            output: Mirrored::poisoned(gpu, &case.output_shape()),
            state: Mirrored::poisoned(gpu, &case.state_shape()),
        }
    }
}

impl<T: Number> Problem<T> {
    pub fn random(gpu: &Gpu, rng: &mut Rng, case: &Case) -> Self {
        let [q, k, v] = case.heads.map(|heads| [case.tokens(), heads, D]);
        let mut keys: Vec<T> = Vec::with_capacity(k.iter().product());
        for _ in 0..k[0] * k[1] {
            let key: Vec<f64> = (0..D).map(|_| rng.unit()).collect();
            let norm = key.iter().map(|number| number * number).sum::<f64>().sqrt();
            keys.extend(key.iter().map(|number| T::from_f64(number / norm)));
        }
        let gates = [case.tokens(), case.state_heads()];
        let mut gate = |wanted: bool, low: f64| {
            let fraction = |rng: &mut Rng| (rng.unit() / 12f64.sqrt() + 0.5).clamp(1e-3, 0.999);
            let numbers = (0..gates[0] * gates[1]).map(|_| (low + (1.0 - low) * fraction(rng)) as f32);
            wanted.then(|| Mirrored::new(gpu, &gates, numbers.collect()))
        };
        let (alpha, beta) = (gate(case.alpha, 0.8), gate(case.beta, 0.0));
        Self {
            alpha,
            beta,
            q: Mirrored::random_scaled(gpu, rng, &q, 0.1),
            k: Mirrored::new(gpu, &k, keys),
            v: Mirrored::random(gpu, rng, &v),
            state: case.state.then(|| Mirrored::random_scaled(gpu, rng, &case.state_shape(), 0.2)),
            case: case.clone(),
        }
    }

    /// Where the case says that sequences start from.
    pub fn start(&self) -> Start<'_> {
        self.state.as_ref().map_or(Start::Zeros, Start::From)
    }

    /// Enqueues the run.
    pub fn run(
        &self,
        workspace: &GdnWorkspace,
        table: &SequenceTable,
        start: Start<'_>,
        results: &mut Results<T>,
    ) -> Result<()> {
        self.run_within(workspace, table, start, results, |run| run())
    }

    /// Gives `around` the call that enqueues the run, while all views exist:
    /// they are made before it and dropped after it.
    pub fn run_within<R>(
        &self,
        workspace: &GdnWorkspace,
        table: &SequenceTable,
        start: Start<'_>,
        results: &mut Results<T>,
        around: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> R,
    ) -> R {
        let (q, k, v) = (self.q.device_view(), self.k.device_view(), self.v.device_view());
        let alpha = self.alpha.as_ref().map(|gate| gate.device_view());
        let beta = self.beta.as_ref().map(|gate| gate.device_view());
        let from = if let Start::From(state) = &start { Some(state.device_view()) } else { None };
        let (mut output, mut state) = (results.output.device_view_mut(), results.state.device_view_mut());
        let input = GdnInput {
            alpha,
            beta,
            state: match (&start, &from) {
                (Start::Zeros, _) => InitialState::Zeros,
                (Start::InPlace, _) => InitialState::InPlace,
                (Start::From(_), from) => InitialState::From(from.unwrap()),
            },
            ..GdnInput::new(q, k, v)
        };
        let mut out = GdnOutput { output: output.reborrow(), state: state.reborrow() };
        around(&mut || gdn_prefill(workspace, &mut out, &input, table, &self.case.options()))
    }

    /// The reference's results, from where the case says.
    pub fn expected(&self) -> Expected {
        self.expected_from(self.state.as_ref().map(Mirrored::wide))
    }

    /// The reference's results from a state, or from zeros.
    pub fn expected_from(&self, state: Option<Vec<f64>>) -> Expected {
        let (output_shape, state_shape) = (self.case.output_shape(), self.case.state_shape());
        let mut output = vec![f64::NAN; output_shape.iter().product()];
        let from = if state.is_some() { InitialState::InPlace } else { InitialState::Zeros };
        let mut state = state.unwrap_or_else(|| vec![f64::NAN; state_shape.iter().product()]);
        let input = GdnInput {
            alpha: self.alpha.as_ref().map(Mirrored::view),
            beta: self.beta.as_ref().map(Mirrored::view),
            state: from,
            ..GdnInput::new(self.q.view(), self.k.view(), self.v.view())
        };
        let mut out = GdnOutput {
            output: TensorMut::from_slice(&mut output, &output_shape).unwrap(),
            state: TensorMut::from_slice(&mut state, &state_shape).unwrap(),
        };
        reference::gdn_prefill(&mut out, &input, &self.case.indices(), &self.case.options()).unwrap();
        Expected { output, state }
    }

    /// Waits, and compares output and final states with the reference's.
    #[track_caller]
    pub fn verify(&self, what: &str, results: &Results<T>, expected: &Expected) {
        self.verify_output(what, results, expected);
        self.verify_state(what, results, expected);
    }

    #[track_caller]
    pub fn verify_output(&self, what: &str, results: &Results<T>, expected: &Expected) {
        let (heads, indices) = (self.case.state_heads(), self.case.indices());
        let rows = |sequence: usize, head: usize| {
            let ends = &indices.cu_seqlens()[sequence..];
            (ends[0] as usize..ends[1] as usize).map(|token| token * heads + head).collect()
        };
        let off =
            compare(what, &results.output.download(), &expected.output, self.groups(rows), bounds::<T>());
        eprintln!("{what}: {} {:?}: output off by {off:.1e}", T::DTYPE, self.case.heads);
    }

    #[track_caller]
    pub fn verify_state(&self, what: &str, results: &Results<T>, expected: &Expected) {
        let heads = self.case.state_heads();
        let rows = |sequence: usize, head: usize| {
            let first = (sequence * heads + head) * D;
            (first..first + D).collect()
        };
        let off = compare(what, &results.state.download(), &expected.state, self.groups(rows), bounds::<T>());
        eprintln!("{what}: {} {:?}: states off by {off:.1e}", T::DTYPE, self.case.heads);
    }

    /// The rows of each sequence and, in it, of each head.
    fn groups(&self, rows: impl Fn(usize, usize) -> Vec<usize>) -> Vec<Vec<Vec<usize>>> {
        let heads = |sequence| (0..self.case.state_heads()).map(|head| rows(sequence, head)).collect();
        (0..self.case.lens.len()).map(heads).collect()
    }

    /// Runs once from where the case says and compares.
    #[track_caller]
    pub fn check(&self, gpu: &Gpu, workspace: &GdnWorkspace, what: &str) -> Results<T> {
        let mut results = Results::poisoned(gpu, &self.case);
        self.run(workspace, &self.case.table(gpu), self.start(), &mut results).unwrap();
        self.verify(what, &results, &self.expected());
        results
    }
}

/// The largest errors that are accepted, for [`compare`]: of a whole tensor,
/// and of one row. The kernel rounds the state, the new values and the products
/// of a tile to the 16-bit type before it multiplies them again (the inverse to
/// f16 for both types). Those roundings carried out on the CPU put the worst
/// rows of single calls at 7e-4 (f16) and 7e-3 (bf16); where states are chained
/// over calls, the worst of a hundred thousand rows is some four times as far
/// off, while a row that is wrong is off by about 1.
fn bounds<T: Number>() -> [f64; 2] {
    if T::DTYPE == DType::F16 { [1e-3, 5e-3] } else { [8e-3, 5e-2] }
}

/// Compares rows of `D` numbers. The norm of all errors is at most the first
/// bound times the norm of all numbers. That of a row's error is at most the
/// second times the norm of the row, or of a typical row of its head in its
/// sequence, or of its sequence, because the terms of a row may cancel. (A
/// sequence of one token has one row for each head: of a few hundred of them,
/// one was 120 times smaller than the others, and then off by 0.17 of itself,
/// 0.0014 of a typical one.) Errors below what f16 can hold are none. Returns
/// the error of the whole.
#[track_caller]
fn compare<T: Number>(
    what: &str,
    got: &[T],
    want: &[f64],
    groups: Vec<Vec<Vec<usize>>>,
    bounds: [f64; 2],
) -> f64 {
    assert_eq!(got.len(), want.len().max(1), "{what}");
    let squares = |row: &usize| want[row * D..][..D].iter().map(|number| number * number).sum::<f64>();
    let mean = |rows: &mut dyn Iterator<Item = &usize>| {
        let (sum, count) = rows.fold((0.0, 0), |(sum, count), row| (sum + squares(row), count + 1));
        sum / f64::from(count.max(1))
    };
    let (mut errors, mut norm): (f64, f64) = (0.0, 0.0);
    for (sequence, heads) in groups.iter().enumerate() {
        let of_sequence = mean(&mut heads.iter().flatten());
        for (head, rows) in heads.iter().enumerate() {
            let typical = mean(&mut rows.iter()).max(of_sequence);
            for row in rows {
                let pairs = got[row * D..][..D].iter().zip(&want[row * D..][..D]);
                let error: f64 = pairs.map(|(got, want)| (got.to_f64() - want).powi(2)).sum();
                let tiny = error <= D as f64 * 3e-8f64.powi(2);
                let off = if tiny { 0.0 } else { (error / squares(row).max(typical)).sqrt() };
                // NaN is not below a bound.
                assert!(
                    off <= bounds[1],
                    "{what}: row {row} (sequence {sequence}, head {head}) is off by {off:e}, allowed are {:e}",
                    bounds[1]
                );
                errors += error;
                norm += squares(row);
            }
        }
    }
    let off = if errors == 0.0 { 0.0 } else { (errors / norm).sqrt() };
    assert!(off <= bounds[0], "{what}: off by {off:e} in all, allowed are {:e}", bounds[0]);
    off
}

/// The comparison itself.
mod tests {
    use std::panic::catch_unwind;

    use super::{D, compare};

    /// Two heads of a sequence of one token, whose rows are filled with these.
    fn compare_rows(got: [f32; 2], want: [f64; 2]) -> Result<f64, ()> {
        let got: Vec<f32> = got.iter().flat_map(|&number| [number; D]).collect();
        let want: Vec<f64> = want.iter().flat_map(|&number| [number; D]).collect();
        catch_unwind(|| compare("test", &got, &want, vec![vec![vec![0], vec![1]]], [8e-3, 5e-2]))
            .map_err(drop)
    }

    #[test]
    fn gdn_comparison_accepts_rows_whose_terms_cancel() {
        assert!(compare_rows([1.0, 1e-2], [1.0, 1e-2]).is_ok());
        assert!(compare_rows([1.0, 1.2e-2], [1.0, 1e-2]).is_ok());
    }

    #[test]
    fn gdn_comparison_notices_errors() {
        // A row of zeros, of another sign, of NaN; all rows a little off.
        for got in [[0.0, 1.0], [-1.0, 1.0], [1.0, 0.9], [f32::NAN, 1.0], [1.02, 1.02]] {
            assert!(compare_rows(got, [1.0, 1.0]).is_err(), "{got:?}");
        }
    }
}
