//! The gated delta rule on the CPU, token by token.

use super::host::{HostCheck, Rows};
use crate::{
    dtype::DType,
    error::Result,
    gdn::{self, GdnInput, GdnOptions, GdnOutput, InitialState, heads_problem, state_heads},
    indices::SequenceIndices,
};

/// Element types of queries, keys, values and output beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// [`gdn::gdn_prefill`](crate::gdn::gdn_prefill) on the CPU.
///
/// Head dimensions are free; queries, keys and values share one. Queries, keys,
/// values and output are `f16`, `bf16`, `f32` or `f64`, states and gates `f32`
/// or `f64`. The state is kept in `f64` from a sequence's first token to its
/// last, and nothing in between is rounded.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, the heads do not fit together, `sequences` is
/// for another number of tokens, or `scale` is 0. Nothing was written.
pub fn gdn_prefill(
    out: &mut GdnOutput<'_>,
    input: &GdnInput<'_>,
    sequences: &SequenceIndices,
    options: &GdnOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::gdn_prefill" };
    check.as_kernel(|check| gdn::check_gdn_prefill(check, out, input, sequences, options))?;
    let q = check.rows("q", &input.q, &DTYPES, &[3])?;
    let k = check.rows("k", &input.k, &DTYPES, &[3])?;
    let v = check.rows("v", &input.v, &DTYPES, &[3])?;
    let (tokens, d) = (q.shape()[0], q.shape()[2]);
    let [q_heads, k_heads, v_heads] = [&q, &k, &v].map(|rows| rows.shape()[1]);
    let Some(heads) = state_heads(q_heads, k_heads, v_heads) else {
        return check.fail("k", heads_problem(q_heads, k_heads, v_heads));
    };
    check.shape("k", &k, &[tokens, k_heads, d])?;
    check.shape("v", &v, &[tokens, v_heads, d])?;
    if sequences.num_tokens() as i64 != tokens {
        return check.fail(
            "sequences",
            format!("it has {} tokens, the tensors have {tokens}", sequences.num_tokens()),
        );
    }
    let mut output = check.rows_mut("output", &mut out.output, &DTYPES, &[3])?;
    check.shape("output", &output.rows, &[tokens, heads, d])?;
    let mut output_state = check.rows_mut("output_state", &mut out.state, &[], &[4])?;
    let state_shape = [sequences.batch_size() as i64, heads, d, d];
    check.shape("output_state", &output_state.rows, &state_shape)?;
    let input_state = match &input.state {
        InitialState::From(state) => {
            let rows = check.rows("input_state", state, &[], &[4])?;
            check.shape("input_state", &rows, &state_shape)?;
            Some(rows)
        }
        InitialState::Zeros | InitialState::InPlace => None,
    };
    let gate = |name, gate| -> Result<Option<Rows<'_>>> {
        let Some(gate) = gate else { return Ok(None) };
        let rows = check.rows(name, gate, &[], &[2])?;
        check.shape(name, &rows, &[tokens, heads])?;
        Ok(Some(rows))
    };
    let alpha = gate("alpha", input.alpha.as_ref())?;
    let beta = gate("beta", input.beta.as_ref())?;
    if options.scale == Some(0.0) {
        return check.fail("scale", "0, which the kernel takes for its default; use None for that".into());
    }

    let scale = options.scale_for(d);
    let (heads, d) = (heads as usize, d as usize);
    let [q_heads, k_heads, v_heads] = [q_heads, k_heads, v_heads].map(|count| count as usize);
    let mut states = vec![0.0; heads * d * d];
    let [mut query, mut key, mut value, mut result] = [(); 4].map(|()| vec![0.0; d]);
    let [mut alphas, mut betas] = [(); 2].map(|()| vec![1.0; heads]);
    for (sequence, ends) in sequences.cu_seqlens().windows(2).enumerate() {
        let first_row = sequence * heads * d;
        for (row, values) in states.chunks_exact_mut(d.max(1)).enumerate() {
            match (&input.state, &input_state) {
                (_, Some(from)) => from.read(first_row + row, values),
                (InitialState::InPlace, _) => output_state.rows.read(first_row + row, values),
                _ => values.fill(0.0),
            }
        }
        for token in ends[0] as usize..ends[1] as usize {
            if let Some(alpha) = &alpha {
                alpha.read(token, &mut alphas);
            }
            if let Some(beta) = &beta {
                beta.read(token, &mut betas);
            }
            for head in 0..heads {
                q.read(token * q_heads + head * q_heads / heads, &mut query);
                k.read(token * k_heads + head * k_heads / heads, &mut key);
                v.read(token * v_heads + head * v_heads / heads, &mut value);
                let state = &mut states[head * d * d..][..d * d];
                step(state, &query, &key, &value, [alphas[head], betas[head]], &mut result);
                result.iter_mut().for_each(|number| *number *= scale);
                output.write(token * heads + head, &result);
            }
        }
        for (row, values) in states.chunks_exact(d.max(1)).enumerate() {
            output_state.write(first_row + row, values);
        }
    }
    Ok(())
}

/// One token of one head: forgets, updates, reads.
fn step(state: &mut [f64], q: &[f64], k: &[f64], v: &[f64], [alpha, beta]: [f64; 2], out: &mut [f64]) {
    for ((row, value), out) in state.chunks_exact_mut(k.len().max(1)).zip(v).zip(out) {
        let held: f64 = row.iter().zip(k).map(|(state, key)| state * key).sum();
        let change = beta * (value - alpha * held);
        *out = 0.0;
        for ((state, key), query) in row.iter_mut().zip(k).zip(q) {
            *state = alpha * *state + change * key;
            *out += *state * query;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::{FlashInferError, TensorMut, reference::testing::view};

    fn lens(lens: &[usize]) -> SequenceIndices {
        SequenceIndices::from_lens(lens.iter().copied()).unwrap()
    }

    /// One head of dimension 2: three tokens worked out by hand.
    const Q: [f64; 6] = [1.0, 1.0, 2.0, 1.0, 0.0, 1.0];
    const K: [f64; 6] = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0];
    const V: [f64; 6] = [3.0, 4.0, 1.0, 1.0, 5.0, 6.0];
    const ALPHA: [f64; 3] = [1.0, 0.5, 1.0];
    const BETA: [f64; 3] = [0.5, 1.0, 1.0];

    fn hand_input<'a>(state: InitialState<'a>) -> GdnInput<'a> {
        GdnInput {
            alpha: Some(view(&ALPHA, &[3, 1])),
            beta: Some(view(&BETA, &[3, 1])),
            state,
            ..GdnInput::new(view(&Q, &[3, 1, 2]), view(&K, &[3, 1, 2]), view(&V, &[3, 1, 2]))
        }
    }

    #[test]
    fn three_tokens_by_hand() {
        let (mut output, mut state) = ([f64::NAN; 6], [f64::NAN; 4]);
        gdn_prefill(
            &mut GdnOutput {
                output: TensorMut::from_slice(&mut output, &[3, 1, 2]).unwrap(),
                state: TensorMut::from_slice(&mut state, &[1, 1, 2, 2]).unwrap(),
            },
            &hand_input(InitialState::Zeros),
            &lens(&[3]),
            &GdnOptions::with_scale(1.0),
        )
        .unwrap();
        // After each token the state is [1.5 0; 2 0], [0.75 1; 1 1] (half is
        // forgotten, then the second key's column is set), [0.75 5; 1 6] (the
        // third key is the second, so its column is replaced).
        assert_eq!(output, [1.5, 2.0, 2.5, 3.0, 5.0, 6.0]);
        assert_eq!(state, [0.75, 5.0, 1.0, 6.0]);
    }

    #[test]
    fn sequences_have_their_own_states() {
        let from = [1.0f64, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0, 2.0];
        let mut in_place = from;
        let mut results = [[f64::NAN; 6]; 2];
        let [first, second] = &mut results;
        let mut state = [f64::NAN; 8];
        let shape = [2, 1, 2, 2];
        for (output, state, initial) in [
            (first, &mut state, InitialState::From(view(&from, &shape))),
            (second, &mut in_place, InitialState::InPlace),
        ] {
            gdn_prefill(
                &mut GdnOutput {
                    output: TensorMut::from_slice(output, &[3, 1, 2]).unwrap(),
                    state: TensorMut::from_slice(state, &shape).unwrap(),
                },
                &hand_input(initial),
                &lens(&[1, 2]),
                &GdnOptions::default(),
            )
            .unwrap();
        }
        // The first: k is e0 and holds (1, 3); moved halfway to (3, 4) it is
        // (2, 3.5). The second: halved, then e1's column becomes (1, 1), then
        // (5, 6); e0's stays zero.
        assert_eq!(state, [2.0, 2.0, 3.5, 4.0, 0.0, 5.0, 0.0, 6.0]);
        let scale = 0.5f64.sqrt();
        let expected = [4.0, 7.5, 1.0, 1.0, 5.0, 6.0].map(|number: f64| number * scale);
        assert!(results[0].iter().zip(expected).all(|(got, want)| (got - want).abs() < 1e-14));
        assert_eq!((results[0], state), (results[1], in_place));
    }

    /// `[tokens, q, k, v heads, d]` and numbers for all tensors.
    fn random(tokens: usize, heads: [usize; 3], d: usize, numbers: &[f64]) -> Numbers {
        let mut numbers = numbers.iter().copied().cycle();
        let mut take = |len: usize| -> Vec<f64> { numbers.by_ref().take(len).collect() };
        let state_heads = heads[0].max(heads[2]);
        let [q, k, v] = heads.map(|count| take(tokens * count * d));
        let [alpha, beta] = [(); 2].map(|()| take(tokens * state_heads).into_iter().map(f64::abs).collect());
        Numbers { heads, d, q, k, v, alpha, beta }
    }

    struct Numbers {
        heads: [usize; 3],
        d: usize,
        q: Vec<f64>,
        k: Vec<f64>,
        v: Vec<f64>,
        alpha: Vec<f64>,
        beta: Vec<f64>,
    }

    impl Numbers {
        fn state_heads(&self) -> usize {
            self.heads[0].max(self.heads[2])
        }

        /// Output of tokens `start..end` as one sequence; the state is carried on.
        fn run(&self, start: usize, end: usize, state: &mut [f64]) -> Vec<f64> {
            let (tokens, d, state_heads) = (end - start, self.d, self.state_heads());
            let part = |data: &'_ [f64], width: usize| data[start * width..end * width].to_vec();
            let [q_heads, k_heads, v_heads] = self.heads;
            let (q, k, v) =
                (part(&self.q, q_heads * d), part(&self.k, k_heads * d), part(&self.v, v_heads * d));
            let (alpha, beta) = (part(&self.alpha, state_heads), part(&self.beta, state_heads));
            let mut output = vec![f64::NAN; tokens * state_heads * d];
            let input = GdnInput {
                alpha: Some(view(&alpha, &[tokens, state_heads])),
                beta: Some(view(&beta, &[tokens, state_heads])),
                state: InitialState::InPlace,
                ..GdnInput::new(
                    view(&q, &[tokens, q_heads, d]),
                    view(&k, &[tokens, k_heads, d]),
                    view(&v, &[tokens, v_heads, d]),
                )
            };
            let mut out = GdnOutput {
                output: TensorMut::from_slice(&mut output, &[tokens, state_heads, d]).unwrap(),
                state: TensorMut::from_slice(state, &[1, state_heads, d, d]).unwrap(),
            };
            gdn_prefill(&mut out, &input, &lens(&[tokens]), &GdnOptions::default()).unwrap();
            output
        }
    }

    proptest! {
        /// Tokens in two calls with the state carried over are tokens in one.
        #[test]
        fn a_split_changes_nothing(
            tokens in 2usize..12,
            split in 1usize..11,
            d in 1usize..6,
            group in 1usize..4,
            grouped_values: bool,
            numbers in prop::collection::vec(-1.0f64..1.0, 97),
        ) {
            let split = split.min(tokens - 1);
            let heads = if grouped_values { [2, 2, 2 * group] } else { [2 * group, 2, 2] };
            let case = random(tokens, heads, d, &numbers);
            let mut whole_state: Vec<f64> = numbers.iter().copied().cycle().take(2 * group * d * d).collect();
            let mut state = whole_state.clone();
            let whole = case.run(0, tokens, &mut whole_state);
            let mut parts = case.run(0, split, &mut state);
            parts.extend(case.run(split, tokens, &mut state));
            prop_assert_eq!(parts, whole);
            prop_assert_eq!(state, whole_state);
        }

        /// Sharing heads is repeating them.
        #[test]
        fn shared_heads_are_repeated_heads(
            tokens in 1usize..6,
            d in 1usize..5,
            group in 1usize..4,
            grouped_values: bool,
            numbers in prop::collection::vec(-1.0f64..1.0, 97),
        ) {
            let heads = if grouped_values { [2, 2, 2 * group] } else { [2 * group, 2, 2] };
            let case = random(tokens, heads, d, &numbers);
            let repeat = |data: &[f64], count: usize| -> Vec<f64> {
                let times = 2 * group / count;
                data.chunks(d).flat_map(|head| head.repeat(times)).collect()
            };
            let flat = Numbers {
                heads: [2 * group; 3],
                d,
                q: repeat(&case.q, heads[0]),
                k: repeat(&case.k, heads[1]),
                v: repeat(&case.v, heads[2]),
                alpha: case.alpha.clone(),
                beta: case.beta.clone(),
            };
            let (mut state, mut flat_state) = (vec![0.0; 2 * group * d * d], vec![0.0; 2 * group * d * d]);
            prop_assert_eq!(case.run(0, tokens, &mut state), flat.run(0, tokens, &mut flat_state));
            prop_assert_eq!(state, flat_state);
        }

        /// Keys of norm 1 with beta 1 are read back exactly as written.
        #[test]
        fn what_was_written_last_is_read(
            d in 1usize..6,
            numbers in prop::collection::vec(-1.0f64..1.0, 40),
        ) {
            let mut key: Vec<f64> = numbers[..d].to_vec();
            key[0] += 2.0;
            let norm = key.iter().map(|x| x * x).sum::<f64>().sqrt();
            key.iter_mut().for_each(|x| *x /= norm);
            let value = &numbers[d..2 * d];
            let mut state: Vec<f64> = numbers.iter().copied().cycle().take(d * d).collect();
            let mut out = vec![f64::NAN; d];
            step(&mut state, &key, &key, value, [0.7, 1.0], &mut out);
            for (got, want) in out.iter().zip(value) {
                prop_assert!((got - want).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let (mut output, mut state) = ([7.0f64; 6], [7.0f64; 4]);
        let mut refused = |input: GdnInput<'_>, sequences: &[usize], scale: f64, expected: &str| {
            let mut out = GdnOutput {
                output: TensorMut::from_slice(&mut output, &[3, 1, 2]).unwrap(),
                state: TensorMut::from_slice(&mut state, &[1, 1, 2, 2]).unwrap(),
            };
            match gdn_prefill(&mut out, &input, &lens(sequences), &GdnOptions::with_scale(scale)) {
                Err(FlashInferError::InvalidArgument { argument, .. }) if argument == expected => {}
                other => panic!("expected `{expected}` to be refused, got {other:?}"),
            }
        };
        let good = hand_input(InitialState::Zeros);
        let wide = [0.0f64; 12];
        let halves = [f16::ONE; 12];
        refused(good, &[3], 0.0, "scale");
        refused(good, &[2], 1.0, "sequences");
        refused(good, &[1, 2], 1.0, "output_state");
        refused(GdnInput { q: view(&wide, &[3, 2, 2]), ..good }, &[3], 1.0, "output");
        refused(GdnInput { q: view(&wide, &[6, 2]), ..good }, &[3], 1.0, "q");
        refused(GdnInput { k: view(&wide, &[3, 2, 2]), ..good }, &[3], 1.0, "k");
        refused(GdnInput { k: view(&wide, &[3, 1, 4]), ..good }, &[3], 1.0, "k");
        refused(GdnInput { v: view(&wide, &[4, 1, 3]), ..good }, &[3], 1.0, "v");
        refused(GdnInput { alpha: Some(view(&wide, &[3, 2])), ..good }, &[3], 1.0, "alpha");
        refused(GdnInput { beta: Some(view(&halves, &[3, 4])), ..good }, &[3], 1.0, "beta");
        let from = InitialState::From(view(&wide, &[1, 1, 4, 3]));
        refused(GdnInput { state: from, ..good }, &[3], 1.0, "input_state");
        assert_eq!((output, state), ([7.0; 6], [7.0; 4]));
        // No sequences are nothing to do.
        let none = view(&wide[..0], &[0, 1, 2]);
        let (mut output, mut state) = ([0.0f64; 0], [0.0f64; 0]);
        let mut out = GdnOutput {
            output: TensorMut::from_slice(&mut output, &[0, 1, 2]).unwrap(),
            state: TensorMut::from_slice(&mut state, &[0, 1, 2, 2]).unwrap(),
        };
        gdn_prefill(&mut out, &GdnInput::new(none, none, none), &lens(&[]), &GdnOptions::default()).unwrap();
    }
}
