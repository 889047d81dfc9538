//! [`norm::fused_dit_layernorm`](crate::norm::fused_dit_layernorm) on the CPU.

use super::{standardize, vector};
use crate::{
    dtype::DType,
    error::Result,
    norm::{Biased, DitInput, DitOutput, NormOptions, check_fused_dit_layernorm},
    reference::host::{HostCheck, Rows},
    tensor::TensorRef,
};

/// [`norm::fused_dit_layernorm`](crate::norm::fused_dit_layernorm) on the CPU.
///
/// Rows may have any length, and modulations any strides. What is `bf16` there
/// may be `f32` or `f64` here, what is `f32` also `f64`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
pub fn fused_dit_layernorm(
    out: &mut DitOutput<'_>,
    input: &DitInput<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::fused_dit_layernorm" };
    check.as_kernel(|check| check_fused_dit_layernorm(check, out, input))?;
    let rows = check.rows("input", &input.input, &[DType::BF16], &[3])?;
    if rows.width() == 0 {
        return check.fail("input", "its last dimension is 0".into());
    }
    let mut residual_out = check.rows_mut("out.residual", &mut out.residual, &[DType::BF16], &[3])?;
    let mut norm_out = check.rows_mut("out.norm", &mut out.norm, &[DType::BF16], &[3])?;
    check.shape("out.residual", &residual_out.rows, rows.shape())?;
    check.shape("out.norm", &norm_out.rows, rows.shape())?;
    let residual = match &input.residual {
        Some(residual) => Some(alike(check, "residual", residual, &rows)?),
        None => None,
    };
    let (mode_gate, mode_gamma_beta, mode_scale_shift) =
        (input.mode.gate(), input.mode.gamma_beta(), input.mode.scale_shift());
    let gate = match &mode_gate {
        Some(gate) => Some(Modulation::new(check, ["gate", "gate.bias"], gate, &rows)?),
        None => None,
    };
    let gamma_beta = match &mode_gamma_beta {
        Some([gamma, beta]) => Some((
            vector(check, "gamma", gamma, &[], rows.width())?,
            vector(check, "beta", beta, &[], rows.width())?,
        )),
        None => None,
    };
    let scale_shift = match &mode_scale_shift {
        Some([scale, shift]) => Some((
            Modulation::new(check, ["scale", "scale.bias"], scale, &rows)?,
            Modulation::new(check, ["shift", "shift.bias"], shift, &rows)?,
        )),
        None => None,
    };
    let factor = match &input.input_sf_scale {
        Some(scale) => vector(check, "input_sf_scale", scale, &[], 1)?[0],
        None => 1.0,
    };
    for at in 0..rows.count() {
        let mut row = rows.numbers(at);
        row.iter_mut().for_each(|x| *x *= factor);
        if let Some(gate) = &gate {
            row.iter_mut().zip(gate.row(at)).for_each(|(x, gate)| *x *= gate);
        }
        if let Some(residual) = &residual {
            row.iter_mut().zip(residual.numbers(at)).for_each(|(x, residual)| *x += residual);
        }
        residual_out.write(at, &row);
        standardize(&mut row, options.eps);
        if let Some((gamma, beta)) = &gamma_beta {
            for (x, (gamma, beta)) in row.iter_mut().zip(gamma.iter().zip(beta)) {
                *x = *x * gamma + beta;
            }
        }
        if let Some((scale, shift)) = &scale_shift {
            for (x, (scale, shift)) in row.iter_mut().zip(scale.row(at).zip(shift.row(at))) {
                *x = *x * (1.0 + scale) + shift;
            }
        }
        norm_out.write(at, &row);
    }
    Ok(())
}

/// A modulation of each row.
struct Modulation<'a> {
    value: Rows<'a>,
    bias: Vec<f64>,
}

impl<'a> Modulation<'a> {
    fn new(
        check: HostCheck,
        [name, bias_name]: [&'static str; 2],
        pair: &'a Biased<'_>,
        like: &Rows<'_>,
    ) -> Result<Self> {
        let value = alike(check, name, &pair.value, like)?;
        Ok(Self { value, bias: vector(check, bias_name, &pair.bias, &[], like.width())? })
    }

    fn row(&self, at: usize) -> impl Iterator<Item = f64> {
        self.value.numbers(at).into_iter().zip(&self.bias).map(|(value, bias)| value + bias)
    }
}

fn alike<'a>(
    check: HostCheck,
    name: &'static str,
    tensor: &'a TensorRef<'_>,
    like: &Rows<'_>,
) -> Result<Rows<'a>> {
    let rows = check.rows(name, tensor, &[DType::BF16], &[3])?;
    check.shape(name, &rows, like.shape())?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        norm::DitMode,
        reference::testing::{refused, view, view_mut},
    };

    const INPUT: [f64; 4] = [1.0, 3.0, 2.0, 0.0];
    const ONES: [f64; 4] = [1.0; 4];

    fn close(got: &[f64], want: &[f64]) {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-9), "{got:?}, not {want:?}");
    }

    fn run(input: &DitInput<'_>) -> Result<([f64; 4], [f64; 4])> {
        let (mut residual, mut norm) = ([f64::NAN; 4], [f64::NAN; 4]);
        let shape = [1, 2, 2];
        let mut out =
            DitOutput { residual: view_mut(&mut residual, &shape), norm: view_mut(&mut norm, &shape) };
        fused_dit_layernorm(&mut out, input, &NormOptions::with_eps(0.0))?;
        Ok((residual, norm))
    }

    #[test]
    fn modes_by_hand() {
        let shape = [1, 2, 2];
        let input = view(&INPUT, &shape);
        let residual = [0.0f64, 2.0, 4.0, 8.0];
        let residual = Some(view(&residual, &shape));
        // Modulations of the second of six parts, 1 to 4, and biases.
        let mut parts = [f64::NAN; 24];
        for (row, value) in [(0, [1.0, 2.0]), (1, [3.0, 4.0])] {
            parts[row * 12 + 2..row * 12 + 4].copy_from_slice(&value);
        }
        let value = view(&parts, &[1, 2, 6, 2]).select(2, 1).unwrap();
        let (half, ones) = ([0.5f64, -0.5], [1.0f64; 2]);
        let pair = Biased::new(value, view(&half, &[2]));
        let (gamma, beta) = ([2.0f64, 3.0], [10.0f64, 20.0]);

        // Sums 1·1.5 + 0, 3·1.5 + 2; 2·3.5 + 4, 0·3.5 + 8. Norms are ±1.
        let mode =
            DitMode::GateResidualGammaBeta { gate: pair, gamma: view(&gamma, &[2]), beta: view(&beta, &[2]) };
        let (sum, norm) = run(&DitInput::new(input, residual, mode)).unwrap();
        close(&sum, &[1.5, 6.5, 11.0, 8.0]);
        close(&norm, &[8.0, 23.0, 12.0, 17.0]);

        let shift = Biased::new(view(&ONES, &shape), view(&ones, &[2]));
        let mode = DitMode::ResidualScaleShift { scale: pair, shift };
        let (sum, norm) = run(&DitInput::new(input, residual, mode)).unwrap();
        close(&sum, &[1.0, 5.0, 6.0, 8.0]);
        close(&norm, &[-0.5, 4.5, -2.5, 6.5]);

        // Half the input, and no residual.
        let factor = [0.5f64];
        let mode = DitMode::GateResidualScaleShift { gate: pair, scale: pair, shift };
        let mut input = DitInput::new(input, None, mode);
        input.input_sf_scale = Some(view(&factor, &[1]));
        let (sum, norm) = run(&input).unwrap();
        close(&sum, &[0.75, 2.25, 3.5, 0.0]);
        close(&norm, &[-0.5, 4.5, 6.5, -2.5]);
    }

    #[test]
    fn wrong_input_is_refused() {
        let shape = [1, 2, 2];
        let (input, two) = (view(&INPUT, &shape), view(&ONES[..2], &[2]));
        let good = Biased::new(input, two);
        let three = [1.0f64; 12];
        let three = view(&three, &[1, 2, 6]);
        let mode = |scale, shift| DitMode::ResidualScaleShift { scale, shift };
        let refuse = |input: &DitInput<'_>, argument| refused(run(input).map(drop), argument);
        refuse(&DitInput::new(view(&INPUT, &[2, 2]), None, mode(good, good)), "input");
        refuse(&DitInput::new(view(&INPUT, &[1, 1, 2]), None, mode(good, good)), "out.residual");
        refuse(&DitInput::new(input, Some(three), mode(good, good)), "residual");
        refuse(&DitInput::new(input, None, mode(Biased::new(three, two), good)), "scale");
        refuse(&DitInput::new(input, None, mode(good, Biased::new(input, input))), "shift.bias");
        let gamma_beta = DitMode::GateResidualGammaBeta { gate: good, gamma: two, beta: view(&ONES, &[4]) };
        refuse(&DitInput::new(input, None, gamma_beta), "beta");
        let mut scaled = DitInput::new(input, None, mode(good, good));
        scaled.input_sf_scale = Some(two);
        refuse(&scaled, "input_sf_scale");
    }
}
