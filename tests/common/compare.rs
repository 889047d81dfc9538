//! Comparison of what a device wrote with what the reference says.

use flashinfer_rs::TensorRef;

use super::Number;

#[track_caller]
pub fn assert_same_bits<T: Number>(what: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differs = got.iter().zip(want).position(|(got, want)| got.bits() != want.bits());
    if let Some(at) = differs {
        panic!("{what}: element {at} of {} is {:?}, not {:?}", got.len(), got[at], want[at]);
    }
}

/// Compares each row of the part of a tensor that `view`, a view of `host`,
/// shows: the norm of the error is at most `bound` times the norm of the row.
/// Elements that the view does not show are those of `host`. Returns the
/// largest relative error.
#[track_caller]
pub fn rows<T: Number>(
    what: &str,
    view: &TensorRef<'_>,
    host: &[T],
    got: &[T],
    want: &[f64],
    bound: f64,
) -> f64 {
    assert!(got.len() == host.len() && want.len() <= host.len(), "{what}: sizes differ");
    let start = (view.data_ptr() as usize - host.as_ptr() as usize) / size_of::<T>();
    let (sizes, strides) = (view.shape(), view.strides());
    let (&width, outer) = sizes.split_last().expect("a dimension");
    let step = strides[outer.len()];
    // Half the distance of the smallest numbers of f16, for rows near zero.
    let tiny = 3e-8 * (width as f64).sqrt();
    let mut shown = vec![false; got.len()];
    let mut worst: f64 = 0.0;
    for row in 0..outer.iter().product() {
        let (mut rest, mut first): (i64, i64) = (row, start as i64);
        for (size, stride) in outer.iter().zip(strides).rev() {
            first += rest % size * stride;
            rest /= size;
        }
        let (mut error, mut norm): (f64, f64) = (0.0, 0.0);
        for at in (0..width).map(|at| (first + at * step) as usize) {
            shown[at] = true;
            error += (got[at].to_f64() - want[at]).powi(2);
            norm += want[at].powi(2);
        }
        // NaN is neither tiny nor below a bound.
        let error = error.sqrt();
        let relative = if error <= tiny { 0.0 } else { error / norm.sqrt() };
        assert!(
            relative <= bound,
            "{what}: row {row} of {sizes:?} is off by {relative:e}, allowed are {bound:e}"
        );
        worst = worst.max(relative);
    }
    for at in (0..got.len()).filter(|&at| !shown[at]) {
        assert_eq!(got[at].bits(), host[at].bits(), "{what}: element {at} beside the view was written");
    }
    worst
}

/// The comparison itself, which everything else relies on.
mod tests {
    use std::panic::catch_unwind;

    use flashinfer_rs::TensorRef;

    use super::rows;

    /// Two rows of two in storage of two rows of three, all ones but the gaps.
    fn compare(got: [f32; 6], want: [f64; 6]) -> Result<f64, ()> {
        let host = [f32::NAN; 6];
        let view = TensorRef::from_slice(&host, &[2, 3]).unwrap().narrow(1, 1, 2).unwrap();
        catch_unwind(|| rows("test", &view, &host, &got, &want, 1e-3)).map_err(drop)
    }

    const GAP: f32 = f32::NAN;

    #[test]
    fn comparison_accepts_what_is_close() {
        let want = [0.0, 3.0, 4.0, 0.0, 1.0, 0.0];
        assert_eq!(compare([GAP, 3.0, 4.0, GAP, 1.0, 0.0], want), Ok(0.0));
        let worst = compare([GAP, 3.0, 4.004, GAP, 1.0, 0.0], want).unwrap();
        assert!((worst - 8e-4).abs() < 1e-6, "{worst}");
    }

    #[test]
    fn comparison_notices_errors() {
        let want = [0.0, 3.0, 4.0, 0.0, 0.0, 0.0];
        assert!(compare([GAP, 3.0, 4.0, GAP, 0.0, 0.0], want).is_ok());
        // Too far off; beside zeros; poison left; a gap written.
        assert!(compare([GAP, 3.0, 4.01, GAP, 0.0, 0.0], want).is_err());
        assert!(compare([GAP, 3.0, 4.0, GAP, 1e-3, 0.0], want).is_err());
        assert!(compare([GAP, 3.0, GAP, GAP, 0.0, 0.0], want).is_err());
        assert!(compare([GAP, 3.0, 4.0, GAP, 0.0, GAP], want).is_err());
        assert!(compare([GAP, 3.0, 4.0, 1.0, 0.0, 0.0], want).is_err());
        assert!(compare([1.0, 3.0, 4.0, GAP, 0.0, 0.0], want).is_err());
    }
}
