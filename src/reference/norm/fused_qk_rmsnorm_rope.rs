//! [`norm::fused_qk_rmsnorm_rope`](crate::norm::fused_qk_rmsnorm_rope) on the CPU.

use super::{rmsnorm::normalize, vector};
use crate::{
    dtype::DType,
    error::Result,
    norm::{FusedQkOptions, QkvInput, QkvOutput, Rope3d, check_fused_qk_rmsnorm_rope, qkv_shape},
    reference::host::HostCheck,
};

/// The largest `e4m3`, at which results are cut off.
const E4M3_MAX: f64 = 448.0;

/// [`norm::fused_qk_rmsnorm_rope`](crate::norm::fused_qk_rmsnorm_rope) on the CPU.
///
/// Head dimensions and numbers of heads are free. What is `bf16` there may be
/// `f32` or `f64` here; results are `e4m3` or wide with
/// [`output_fp8`](FusedQkOptions::output_fp8), `bf16` or wide without. A norm is
/// not rounded before it is turned.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or `rope` makes no sense. Nothing was written.
pub fn fused_qk_rmsnorm_rope(
    out: &mut QkvOutput<'_>,
    input: &QkvInput<'_>,
    rope: &Rope3d,
    options: &FusedQkOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::fused_qk_rmsnorm_rope" };
    let shape = rope
        .check()
        .and_then(|()| qkv_shape(out, input, rope))
        .or_else(|(argument, problem)| check.fail(argument, problem))?;
    check.as_kernel(|check| check_fused_qk_rmsnorm_rope(check, out, input, rope, options))?;
    let d = shape.head_dim as usize;
    let qkv = check.rows("qkv", &input.qkv, &[DType::BF16], &[2, 3])?;
    let weights = [
        vector(check, "q_weight", &input.q_weight, &[DType::BF16], shape.heads[0] as usize * d)?,
        vector(check, "k_weight", &input.k_weight, &[DType::BF16], shape.heads[1] as usize * d)?,
    ];
    let result = [if options.output_fp8 { DType::E4M3 } else { DType::BF16 }];
    let mut outputs = [
        check.rows_mut("out.q", &mut out.q, &result, &[3, 4])?,
        check.rows_mut("out.k", &mut out.k, &result, &[3, 4])?,
        check.rows_mut("out.v", &mut out.v, &result, &[3, 4])?,
    ];
    let frequencies = frequencies(rope);
    let quantized = |x: f64, scale: f64| {
        if options.output_fp8 { (x * scale).clamp(-E4M3_MAX, E4M3_MAX) } else { x }
    };
    for token in 0..shape.tokens as usize {
        let row = qkv.numbers(token);
        let angles = angles(token, input.patches, rope, &frequencies);
        let mut rest = &row[..];
        for (kind, out) in outputs.iter_mut().enumerate() {
            let heads = shape.heads[kind] as usize;
            let (part, after) = rest.split_at(heads * d);
            rest = after;
            let mut part = part.to_vec();
            if let Some(weight) = weights.get(kind) {
                if options.is_qk_norm {
                    normalize(&mut part, weight, options.eps);
                }
                for head in part.chunks_mut(d) {
                    turn(head, &angles, options.interleave);
                }
                let factor = f64::from(rope.attention_factor);
                part.iter_mut().for_each(|x| *x = quantized(*x * factor, options.output_quant_scale));
            } else {
                part.iter_mut().for_each(|x| *x = quantized(*x, options.v_quant_scale));
            }
            for (head, numbers) in part.chunks(d).enumerate() {
                out.write(token * heads + head, numbers);
            }
        }
    }
    Ok(())
}

/// The frequencies of all pairs: those of frame, height and width.
fn frequencies(rope: &Rope3d) -> Vec<f64> {
    let [base, factor, low] = [rope.base, rope.factor, rope.low].map(f64::from);
    let same = (rope.low - rope.high).abs() <= 1e-6;
    let high = f64::from(rope.high) + if same { 0.001 } else { 0.0 };
    let of_axis = |channels: usize| {
        (0..channels / 2).map(move |pair| {
            let frequency = base.powf(-2.0 * pair as f64 / channels as f64);
            let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (1.0 - divided) + frequency / factor * divided
        })
    };
    rope.channels.into_iter().flat_map(of_axis).collect()
}

/// What each pair turns by at a token.
fn angles(token: usize, [ppf, pph, ppw]: [usize; 3], rope: &Rope3d, frequencies: &[f64]) -> Vec<f64> {
    let token = token % (ppf * pph * ppw);
    let position = [token / (pph * ppw), token / ppw % pph, token % ppw];
    let axes = position.into_iter().zip(rope.channels);
    let positions = axes.flat_map(|(position, channels)| std::iter::repeat_n(position, channels / 2));
    positions.zip(frequencies).map(|(position, frequency)| position as f64 * frequency).collect()
}

/// Turns the pairs of a head: neighbours, or elements half a head apart.
fn turn(head: &mut [f64], angles: &[f64], interleave: bool) {
    for (pair, angle) in angles.iter().enumerate() {
        let (x, y) = if interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + angles.len()) };
        let (sin, cos) = angle.sin_cos();
        (head[x], head[y]) = (head[x] * cos - head[y] * sin, head[y] * cos + head[x] * sin);
    }
}

#[cfg(test)]
mod tests {
    use float8::F8E4M3;

    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    /// One query head, key head and value head of 6 elements, which turn with
    /// frame, height and width.
    fn run<T: crate::Element + Copy>(
        qkv: &[f64],
        patches: [usize; 3],
        rope: &Rope3d,
        options: &FusedQkOptions,
        zero: T,
    ) -> Result<[Vec<T>; 3]> {
        let tokens = qkv.len() / 18;
        let mut out = [0; 3].map(|_| vec![zero; tokens * 6]);
        let weight = [2.0f64; 6];
        {
            let [q, k, v] = &mut out;
            let shape = [tokens, 1, 6];
            fused_qk_rmsnorm_rope(
                &mut QkvOutput { q: view_mut(q, &shape), k: view_mut(k, &shape), v: view_mut(v, &shape) },
                &QkvInput {
                    qkv: view(qkv, &[tokens, 18]),
                    q_weight: view(&weight, &[6]),
                    k_weight: view(&weight, &[6]),
                    patches,
                },
                rope,
                options,
            )?;
        }
        Ok(out)
    }

    fn close(got: &[f64], want: &[f64]) {
        assert!(
            got.len() == want.len() && got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12),
            "{got:?}, not {want:?}"
        );
    }

    #[test]
    fn positions_turn_their_channels() {
        // Token 23 of 2 × 3 × 4: frame 1, height 2, width 3. Of two channels
        // the frequency is 1.
        let mut qkv = vec![0.0; 24 * 18];
        qkv[23 * 18..].copy_from_slice(&[
            1.0, 0.0, 1.0, 0.0, 0.0, 1.0, // query
            1.0, 2.0, 3.0, 4.0, 5.0, 6.0, // key
            9.0, 8.0, 7.0, 6.0, 5.0, 4.0, // value
        ]);
        let rope = Rope3d::new([2, 2, 2]);
        let options = FusedQkOptions { is_qk_norm: false, ..FusedQkOptions::default() };
        let [q, k, v] = run(&qkv, [2, 3, 4], &rope, &options, f64::NAN).unwrap();
        let (c, s) = ([1.0f64, 2.0, 3.0].map(f64::cos), [1.0f64, 2.0, 3.0].map(f64::sin));
        close(&q[23 * 6..], &[c[0], s[0], c[1], s[1], -s[2], c[2]]);
        close(&k[23 * 6..23 * 6 + 2], &[c[0] - 2.0 * s[0], 2.0 * c[0] + s[0]]);
        assert_eq!(v[23 * 6..], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]);
        // Half a head apart: elements 0 and 3 with the frame, and so on.
        let options = FusedQkOptions { interleave: false, ..options };
        let [_, k, _] = run(&qkv, [2, 3, 4], &rope, &options, f64::NAN).unwrap();
        let turned = |at: usize| {
            let (x, y) = (1.0 + at as f64, 4.0 + at as f64);
            [x * c[at] - y * s[at], y * c[at] + x * s[at]]
        };
        let pairs = [0, 1, 2].map(turned);
        close(&k[23 * 6..], &[0, 1].map(|side| pairs.map(|pair| pair[side])).concat());
    }

    #[test]
    fn norms_are_over_all_heads_and_precede_turning() {
        // One token, which is not turned; the root mean square of the query is 1.
        let qkv: Vec<f64> = [[1.0, -1.0].repeat(3), vec![3.0; 6], vec![5.0; 6]].concat();
        let options = FusedQkOptions { eps: 0.0, ..FusedQkOptions::default() };
        let [q, k, v] = run(&qkv, [1, 1, 1], &Rope3d::new([2, 2, 2]), &options, f64::NAN).unwrap();
        close(&q, &[2.0, -2.0].repeat(3));
        close(&k, &[2.0; 6]);
        assert_eq!(v, [5.0; 6]);
    }

    #[test]
    fn yarn_by_hand() {
        // Pairs 0 to 3 of 8 channels: kept, kept, half of each, divided by 4.
        let rope = Rope3d {
            base: 16.0,
            factor: 4.0,
            low: 1.0,
            high: 3.0,
            attention_factor: 2.0,
            ..Rope3d::new([8, 0, 0])
        };
        close(&frequencies(&rope), &[1.0, 0.5, 0.25 * 0.625, 0.125 / 4.0]);
        // Limits that are the same are a step behind that pair.
        close(&frequencies(&Rope3d { low: 1.0, high: 1.0, ..rope }), &[1.0, 0.5, 0.0625, 0.03125]);
        let qkv: Vec<f64> = (0..18).map(f64::from).collect();
        let rope = Rope3d { channels: [6, 0, 0], ..rope };
        let options = FusedQkOptions { is_qk_norm: false, ..FusedQkOptions::default() };
        let [q, _, v] = run(&qkv, [1, 1, 1], &rope, &options, f64::NAN).unwrap();
        close(&q, &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(v, qkv[12..]);
    }

    #[test]
    fn quantized_results_are_scaled_and_cut_off() {
        let qkv: Vec<f64> = [vec![1.0; 6], vec![-1000.0; 6], vec![3.0; 6]].concat();
        let options = FusedQkOptions {
            is_qk_norm: false,
            output_fp8: true,
            output_quant_scale: 2.0,
            v_quant_scale: 0.5,
            ..FusedQkOptions::default()
        };
        let [q, k, v] = run(&qkv, [1, 1, 1], &Rope3d::new([2, 2, 2]), &options, F8E4M3::ZERO).unwrap();
        let number = F8E4M3::from_f64;
        assert_eq!((q, k, v), (vec![number(2.0); 6], vec![number(-448.0); 6], vec![number(1.5); 6]));
    }

    #[test]
    fn wrong_input_is_refused() {
        let qkv = vec![1.0; 4 * 18];
        let (rope, options) = (Rope3d::new([2, 2, 2]), FusedQkOptions::default());
        let fp8 = FusedQkOptions { output_fp8: true, ..options };
        let refuse = |patches, rope: &Rope3d, options: &FusedQkOptions, argument| {
            refused(run(&qkv, patches, rope, options, half::bf16::ZERO).map(drop), argument);
        };
        assert!(run(&qkv, [1, 2, 2], &rope, &options, half::bf16::ZERO).is_ok());
        refuse([1, 1, 3], &rope, &options, "patches");
        refuse([1, 1, 4], &Rope3d::new([2, 2, 4]), &options, "out.q");
        refuse([1, 1, 4], &Rope3d::new([1, 3, 2]), &options, "rope.channels");
        refuse([1, 1, 4], &rope, &fp8, "out.q");
    }
}
