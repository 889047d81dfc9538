//! Frequencies of rotary embeddings, and the table of cosines and sines that
//! kernels look up.

use std::f64::consts::TAU;

use crate::{
    cuda::{DeviceBuffer, StagingBuffer, upload},
    dtype::DType,
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorRef},
};

const OP: &str = "RopeFrequencies";

/// How a model stretches the frequencies that it was trained with, to serve
/// longer contexts.
///
/// `f(i) = rope_theta^(−2i / rotary_dim)` below is the angle, in radians, by
/// which pair `i` of elements turns from one position to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// `f(i)`, as in the RoFormer paper (arXiv 2104.09864, section 3.2.2).
    #[default]
    None,
    /// `f(i) / factor`: position interpolation (arXiv 2306.15595).
    Linear {
        /// How many times as long contexts become.
        factor: f64,
    },
    /// Llama 3.1: pairs that turn more than `high_freq_factor` times within the
    /// old context keep `f(i)`, those that turn less than `low_freq_factor`
    /// times get `f(i) / factor`, and those between are interpolated by their
    /// number of turns. As in Meta's `llama-models` (`apply_scaling`).
    Llama31(Llama31Scaling),
    /// YaRN (arXiv 2309.00071), as in the code of its authors and in Hugging
    /// Face Transformers.
    Yarn(YarnScaling),
}

/// Parameters of [`RopeScaling::Llama31`]. The defaults are Llama 3.1's.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Llama31Scaling {
    /// What slow frequencies are divided by. Default 8.
    pub factor: f64,
    /// Turns within the old context up to which a frequency is slow. Default 1.
    pub low_freq_factor: f64,
    /// Turns within the old context from which on a frequency is fast. Default 4.
    pub high_freq_factor: f64,
    /// Positions of the context that the model was trained with. Default 8192.
    pub old_context_len: f64,
}

impl Default for Llama31Scaling {
    fn default() -> Self {
        Self { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, old_context_len: 8192.0 }
    }
}

/// Parameters of [`RopeScaling::Yarn`].
///
/// Frequencies are `f(i) · (1 − ramp(i)) + f(i) / factor · ramp(i)`, where
/// `ramp` goes from 0 to 1 between the pair that turns `beta_fast` times within
/// the old context (rounded down) and the one that turns `beta_slow` times
/// (rounded up). Cosines and sines are multiplied by the attention factor.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct YarnScaling {
    /// How many times as long contexts become. Default 1.
    pub factor: f64,
    /// Positions of the context that the model was trained with. Default 4096.
    pub old_context_len: f64,
    /// Turns from which on a frequency is kept. Default 32.
    pub beta_fast: f64,
    /// Turns up to which a frequency is divided by `factor`. Default 1.
    pub beta_slow: f64,
    /// With [`mscale_all_dim`](Self::mscale_all_dim) gives the attention factor
    /// `m(mscale) / m(mscale_all_dim)`, where `m(x) = 0.1 · x · ln(factor) + 1`
    /// for a factor above 1, else 1. Default 1.
    pub mscale: f64,
    /// See [`mscale`](Self::mscale). Default 0, so that the attention factor
    /// is `m(mscale)`.
    pub mscale_all_dim: f64,
    /// The attention factor itself, where a model's configuration has it.
    pub attention_factor: Option<f64>,
}

impl Default for YarnScaling {
    fn default() -> Self {
        Self {
            factor: 1.0,
            old_context_len: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 0.0,
            attention_factor: None,
        }
    }
}

impl YarnScaling {
    /// For contexts `factor` times as long as `old_context_len`, with the
    /// defaults of the paper.
    pub fn new(factor: f64, old_context_len: f64) -> Self {
        Self { factor, old_context_len, ..Self::default() }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        let m = |scale: f64| if self.factor > 1.0 { 0.1 * scale * self.factor.ln() + 1.0 } else { 1.0 };
        self.attention_factor.unwrap_or_else(|| m(self.mscale) / m(self.mscale_all_dim))
    }
}

/// The frequencies of a rotary embedding: how far each pair of elements turns
/// from one position to the next. All is computed in `f64`.
///
/// ```
/// use flashinfer_rs::rope::{Llama31Scaling, RopeFrequencies, RopeScaling};
/// let scaling = RopeScaling::Llama31(Llama31Scaling::default());
/// let frequencies = RopeFrequencies::new(128, 5e5, &scaling)?;
/// let rows = frequencies.cos_sin_rows(4096); // [4096, 128] on the host
/// assert_eq!((rows[0], rows[64]), (1.0, 0.0)); // cos(0), sin(0)
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    inv_freq: Vec<f64>,
    attention_factor: f64,
}

impl RopeFrequencies {
    /// Those of `rotary_dim` elements.
    ///
    /// # Errors
    /// `rotary_dim` is 0, odd, or 2³¹ or more, or a parameter is out of its range: all must be
    /// positive and finite (`mscale` and `mscale_all_dim` may be 0),
    /// `rope_theta` for YaRN not 1, `low_freq_factor` below `high_freq_factor`,
    /// `beta_slow` below `beta_fast`.
    pub fn new(rotary_dim: usize, rope_theta: f64, scaling: &RopeScaling) -> Result<Self> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > i32::MAX as usize {
            return invalid("rotary_dim", format!("{rotary_dim}; it must be even, not 0 and below 2^31"));
        }
        positive(OP, "rope_theta", rope_theta)?;
        let (pairs, dim) = (rotary_dim / 2, rotary_dim as f64);
        let plain = (0..pairs).map(|pair| rope_theta.powf(-2.0 * pair as f64 / dim));
        let (inv_freq, attention_factor) = match scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => {
                positive(OP, "factor", *factor)?;
                (plain.map(|freq| freq / factor).collect(), 1.0)
            }
            RopeScaling::Llama31(scaling) => {
                scaling.check(OP)?;
                (plain.map(|freq| scaling.of(freq)).collect(), 1.0)
            }
            RopeScaling::Yarn(scaling) => {
                let ramp = scaling.ramp(dim, rope_theta)?;
                let scaled = |(pair, freq): (usize, f64)| {
                    let ramp = ramp(pair as f64);
                    freq * (1.0 - ramp) + freq / scaling.factor * ramp
                };
                (plain.enumerate().map(scaled).collect(), scaling.attention_factor())
            }
        };
        Self::from_inv_freq(inv_freq, attention_factor)
    }

    /// Frequencies of the caller's own, one for each pair of elements, such as
    /// those of LongRoPE, and what cosines and sines are multiplied by.
    ///
    /// # Errors
    /// There is none, or a number is not finite.
    pub fn from_inv_freq(inv_freq: Vec<f64>, attention_factor: f64) -> Result<Self> {
        if inv_freq.is_empty() {
            return invalid("inv_freq", "empty; there is one for each pair of elements".into());
        }
        if let Some(pair) = inv_freq.iter().position(|freq| !freq.is_finite()) {
            return invalid("inv_freq", format!("that of pair {pair} is {}", inv_freq[pair]));
        }
        if !attention_factor.is_finite() {
            return invalid("attention_factor", format!("{attention_factor}; it must be finite"));
        }
        Ok(Self { inv_freq, attention_factor })
    }

    /// Elements that are turned: two for each frequency.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// The frequencies, in radians per position.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// What cosines and sines are multiplied by; 1 but for YaRN.
    pub fn attention_factor(&self) -> f64 {
        self.attention_factor
    }

    /// The cosines of a position's angles, then the sines: `rotary_dim`
    /// numbers, times the attention factor.
    pub(crate) fn cos_sin(&self, position: f64) -> impl Iterator<Item = f64> {
        let angles = move || self.inv_freq.iter().map(move |freq| position * freq);
        angles().map(f64::cos).chain(angles().map(f64::sin)).map(|number| number * self.attention_factor)
    }

    /// The rows of positions `0..max_pos` on the host, `[max_pos, rotary_dim]`:
    /// in each the cosines, then the sines.
    pub fn cos_sin_rows(&self, max_pos: usize) -> Vec<f32> {
        (0..max_pos).flat_map(|position| self.cos_sin(position as f64)).map(|number| number as f32).collect()
    }
}

impl Llama31Scaling {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        for (name, number) in [
            ("factor", self.factor),
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
            ("old_context_len", self.old_context_len),
        ] {
            positive(op, name, number)?;
        }
        if self.low_freq_factor < self.high_freq_factor {
            return Ok(());
        }
        let problem =
            format!("{}; it must be below high_freq_factor, {}", self.low_freq_factor, self.high_freq_factor);
        Err(FlashInferError::invalid(op, "low_freq_factor", problem))
    }

    fn of(&self, freq: f64) -> f64 {
        let turns = self.old_context_len * freq / TAU;
        let smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let smooth = smooth.clamp(0.0, 1.0);
        (1.0 - smooth) * freq / self.factor + smooth * freq
    }
}

impl YarnScaling {
    /// How far each pair is on the way from kept to divided.
    fn ramp(&self, dim: f64, rope_theta: f64) -> Result<impl Fn(f64) -> f64> {
        for (name, number) in [
            ("factor", self.factor),
            ("old_context_len", self.old_context_len),
            ("beta_fast", self.beta_fast),
            ("beta_slow", self.beta_slow),
        ] {
            positive(OP, name, number)?;
        }
        if self.beta_slow >= self.beta_fast {
            return invalid(
                "beta_slow",
                format!("{}; it must be below beta_fast, {}", self.beta_slow, self.beta_fast),
            );
        }
        if rope_theta == 1.0 {
            return invalid("rope_theta", "1; all pairs would turn equally fast".into());
        }
        // The pair that turns so many times within the old context.
        let pair = |turns: f64| dim * (self.old_context_len / (turns * TAU)).ln() / (2.0 * rope_theta.ln());
        let low = pair(self.beta_fast).floor().max(0.0);
        let mut high = pair(self.beta_slow).ceil().min(dim - 1.0);
        if high == low {
            high += 0.001;
        }
        Ok(move |pair: f64| ((pair - low) / (high - low)).clamp(0.0, 1.0))
    }
}

/// The cosines and sines of positions on a device: `f32` `[rows, rotary_dim]`,
/// in each row the cosines, then the sines.
///
/// There is one row more than was asked for: kernels that turn interleaved
/// pairs read up to 32 bytes beyond a row, so they cannot use the last.
pub struct CosSinCache {
    buffer: DeviceBuffer,
    max_pos: usize,
    rotary_dim: usize,
}

impl CosSinCache {
    /// Rows that are computed and copied at a time have about this many bytes.
    const CHUNK: usize = 1 << 20;

    /// Computes the rows of positions `0..=max_pos` and uploads them, for use on
    /// `stream`.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`]: out of memory, no device, no driver; the
    /// cache would have 2³¹ elements or more; the stream is being captured into
    /// a graph; or the runtime cannot be started.
    pub fn new(stream: &Stream, frequencies: &RopeFrequencies, max_pos: usize) -> Result<Self> {
        stream.check_usable_here("CosSinCache")?;
        let rotary_dim = frequencies.rotary_dim();
        let all_rows = max_pos.saturating_add(1);
        let elements = all_rows.saturating_mul(rotary_dim);
        if elements > i32::MAX as usize {
            let problem = format!("{max_pos} rows of {rotary_dim} are 2^31 elements or more");
            return Err(FlashInferError::invalid("CosSinCache", "max_pos", problem));
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        let buffer = DeviceBuffer::new(cuda, stream, elements * size_of::<f32>())?;
        let row_bytes = rotary_dim * size_of::<f32>();
        let rows_at_once = (Self::CHUNK / row_bytes).clamp(1, all_rows);
        let mut staging = StagingBuffer::new(cuda, stream, rows_at_once * row_bytes)?;
        for first in (0..all_rows).step_by(rows_at_once) {
            let rows = first..all_rows.min(first + rows_at_once);
            staging.stage(stream, |bytes| {
                let bytes = &mut bytes[..rows.len() * row_bytes];
                for (position, row) in rows.zip(bytes.chunks_exact_mut(row_bytes)) {
                    for (to, number) in row.chunks_exact_mut(4).zip(frequencies.cos_sin(position as f64)) {
                        to.copy_from_slice(&(number as f32).to_ne_bytes());
                    }
                }
                // SAFETY: the staging buffer is page-locked and is not written
                // again before the event that `stage` records has passed.
                unsafe { upload(bytes, &buffer, first * row_bytes) }
            })?;
        }
        Ok(Self { buffer, max_pos, rotary_dim })
    }

    /// The number of positions that were asked for.
    pub fn max_pos(&self) -> usize {
        self.max_pos
    }

    /// Elements of a head that are turned.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// The cache for a kernel, `[max_pos + 1, rotary_dim]`.
    ///
    /// # Errors
    /// None in practice: the sizes were checked.
    pub fn view(&self) -> Result<TensorRef<'_>> {
        let stream = self.buffer.stream();
        let shape = [self.max_pos + 1, self.rotary_dim];
        let mut raw = RawTensor::new(self.buffer.as_ptr(), stream.device(), DType::F32, &shape, None)?;
        (raw.stream, raw.owner) = (Some(stream.id()), Some(self.buffer.owner()));
        Ok(TensorRef::new(raw))
    }
}

/// Refuses a number that is not positive and finite.
pub(super) fn positive(op: &'static str, argument: &'static str, number: f64) -> Result<()> {
    if number > 0.0 && number.is_finite() {
        return Ok(());
    }
    Err(FlashInferError::invalid(op, argument, format!("{number}; it must be positive and finite")))
}

fn invalid<T>(argument: &'static str, problem: String) -> Result<T> {
    Err(FlashInferError::invalid(OP, argument, problem))
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    #[track_caller]
    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-13 * want.abs().max(1e-300), "{got} is not {want}");
    }

    #[test]
    fn plain_and_linear_frequencies() {
        // 10000^(−2i/8) is 1, 1/10, 1/100, 1/1000.
        let plain = RopeFrequencies::new(8, 1e4, &RopeScaling::None).unwrap();
        let linear = RopeFrequencies::new(8, 1e4, &RopeScaling::Linear { factor: 4.0 }).unwrap();
        for (pair, want) in [1.0, 0.1, 0.01, 0.001].into_iter().enumerate() {
            close(plain.inv_freq()[pair], want);
            close(linear.inv_freq()[pair], want / 4.0);
        }
        assert_eq!((plain.rotary_dim(), plain.attention_factor()), (8, 1.0));
    }

    /// Each band of wavelengths, with the conditions as Meta's code has them.
    #[test]
    fn llama31_has_three_bands() {
        let frequencies =
            RopeFrequencies::new(128, 5e5, &RopeScaling::Llama31(Llama31Scaling::default())).unwrap();
        let (long, short) = (8192.0 / 1.0, 8192.0 / 4.0);
        let mut bands = [0; 3];
        for (pair, &got) in frequencies.inv_freq().iter().enumerate() {
            let plain = (-(pair as f64) / 64.0 * 5e5f64.ln()).exp();
            let wavelength = 2.0 * PI / plain;
            let (band, want) = if wavelength < short {
                (0, plain)
            } else if wavelength > long {
                (1, plain / 8.0)
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (2, (1.0 - smooth) * plain / 8.0 + smooth * plain)
            };
            bands[band] += 1;
            assert!((got - want).abs() <= 1e-12 * want, "pair {pair}: {got} is not {want}");
        }
        // ln(2048 / 2π) · 64 / ln(5e5) = 28.2: pairs 0 to 28 turn at least four
        // times. ln(8192 / 2π) · 64 / ln(5e5) = 34.98: 35 to 63 less than once.
        assert_eq!(bands, [29, 29, 6]);
    }

    #[test]
    fn yarn_ramps_from_kept_to_divided() {
        // DeepSeek V2: 64 elements, base 1e4, 40 times 4096 tokens. Pairs
        // that turn 32 times and once: 64 · ln(4096 / 64π) / (2 · ln 1e4) =
        // 10.47, down to 10; 64 · ln(4096 / 2π) / (2 · ln 1e4) = 22.51, up to 23.
        let yarn = YarnScaling::new(40.0, 4096.0);
        let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::Yarn(yarn)).unwrap();
        let plain = |pair: usize| 1e4f64.powf(-(pair as f64) / 32.0);
        for pair in 0..32 {
            let ramp = match pair {
                0..=10 => 0.0,
                23.. => 1.0,
                _ => (pair as f64 - 10.0) / 13.0,
            };
            close(frequencies.inv_freq()[pair], plain(pair) * (1.0 - ramp) + plain(pair) / 40.0 * ramp);
        }
        // 0.1 · ln 40 + 1.
        close(frequencies.attention_factor(), 1.368_887_945_411_393_6);
        // Rows are scaled by it.
        let rows = frequencies.cos_sin_rows(2);
        assert_eq!((rows.len(), rows[0], rows[32]), (128, 1.368_887_945_411_393_6_f64 as f32, 0.0));
        assert!((f64::from(rows[64]) - 1.368_887_945 * 1f64.cos()).abs() < 1e-7);
        assert!((f64::from(rows[96]) - 1.368_887_945 * 1f64.sin()).abs() < 1e-7);
    }

    #[test]
    fn yarn_attention_factors() {
        let yarn = YarnScaling { mscale_all_dim: 1.0, ..YarnScaling::new(40.0, 4096.0) };
        close(yarn.attention_factor(), 1.0);
        // (0.0707 · ln 40 + 1) / (0.1 · ln 40 + 1)
        let yarn = YarnScaling { mscale: 0.707, ..yarn };
        close(yarn.attention_factor(), 1.260_803_777_405_855_4 / 1.368_887_945_411_393_6);
        let yarn = YarnScaling { attention_factor: Some(1.25), ..yarn };
        close(yarn.attention_factor(), 1.25);
        close(YarnScaling::new(1.0, 4096.0).attention_factor(), 1.0);
        close(YarnScaling::new(0.5, 4096.0).attention_factor(), 1.0);
    }

    #[test]
    fn rows_hold_cosines_then_sines() {
        let frequencies = RopeFrequencies::from_inv_freq(vec![PI / 2.0, PI / 6.0], 2.0).unwrap();
        let rows = frequencies.cos_sin_rows(3);
        let want = [2.0, 2.0, 0.0, 0.0, 0.0, 3f64.sqrt(), 2.0, 1.0, -2.0, 1.0, 0.0, 3f64.sqrt()];
        assert_eq!(rows.len(), want.len());
        for (got, want) in rows.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-7, "{rows:?}");
        }
        // The angle is exact far out, where f32 has lost it.
        let far: Vec<f64> = frequencies.cos_sin(1_000_003.0).collect();
        assert!((far[0] - 0.0).abs() < 1e-9 && (far[2] + 2.0).abs() < 1e-9, "{far:?}");
    }

    #[test]
    fn impossible_parameters_are_refused() {
        let problem = |dim, theta, scaling: &RopeScaling| {
            RopeFrequencies::new(dim, theta, scaling).unwrap_err().to_string()
        };
        assert!(problem(0, 1e4, &RopeScaling::None).contains("rotary_dim"));
        assert!(problem(7, 1e4, &RopeScaling::None).contains("rotary_dim"));
        assert!(problem(usize::MAX - 1, 1e4, &RopeScaling::None).contains("rotary_dim"));
        for theta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(problem(8, theta, &RopeScaling::None).contains("rope_theta"));
        }
        assert!(problem(8, 1e4, &RopeScaling::Linear { factor: 0.0 }).contains("factor"));
        let llama = |low_freq_factor, high_freq_factor| {
            RopeScaling::Llama31(Llama31Scaling { low_freq_factor, high_freq_factor, ..Default::default() })
        };
        assert!(problem(8, 1e4, &llama(4.0, 4.0)).contains("low_freq_factor"));
        assert!(problem(8, 1e4, &llama(0.0, 4.0)).contains("low_freq_factor"));
        assert!(problem(8, 1e4, &llama(1.0, f64::NAN)).contains("high_freq_factor"));
        let yarn = |beta_fast, beta_slow| {
            RopeScaling::Yarn(YarnScaling { beta_fast, beta_slow, ..YarnScaling::new(2.0, 4096.0) })
        };
        assert!(problem(8, 1e4, &yarn(1.0, 1.0)).contains("beta_slow"));
        assert!(problem(8, 1e4, &yarn(f64::NAN, 1.0)).contains("beta_fast"));
        assert!(problem(8, 1.0, &yarn(32.0, 1.0)).contains("rope_theta"));
        let mscale = RopeScaling::Yarn(YarnScaling { mscale: f64::NAN, ..YarnScaling::new(2.0, 4096.0) });
        assert!(problem(8, 1e4, &mscale).contains("attention_factor"));
        assert!(RopeFrequencies::from_inv_freq(vec![], 1.0).is_err());
        assert!(RopeFrequencies::from_inv_freq(vec![1.0, f64::NAN], 1.0).is_err());
    }
}
